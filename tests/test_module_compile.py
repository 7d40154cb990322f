"""Our module in torch.compile, torch.export, make_fx and torch.fx: one graph, no break, no recompilation."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

import attn
from attn.testing import assert_close

E, H = 16, 4
SIZES = [(2, 5), (3, 7), (4, 6)]  # sizes >= 2: 0 and 1 are specialisations of torch's own


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def module(**options: Any) -> attn.MultiheadAttention:
    torch.manual_seed(0)
    return attn.MultiheadAttention(E, H, batch_first=True, **options)


def padding_of(n: int, length: int) -> Tensor:
    return torch.arange(length) >= torch.arange(length, 0, -1)[:n, None].clamp(min=1)


CALLS = {
    "weights": {"need_weights": True},
    "weights per head": {"need_weights": True, "average_attn_weights": False},
    "no weights": {"need_weights": False},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("masked", ["", "padding", "causal", "hint"])
@pytest.mark.parametrize("training", [True, False])
def test_one_graph_for_all_sizes(call: str, masked: str, training: bool) -> None:
    m = module().train(training)
    options = CALLS[call]
    if masked == "hint" and options["need_weights"]:
        pytest.skip("the hint is taken at its word without weights only")
    counter = CompileCounter()
    compiled = torch.compile(m, fullgraph=True, dynamic=True, backend=counter)
    for n, length in SIZES:
        x = torch.randn(n, length, E)
        masks = {
            "": {},
            "padding": {"key_padding_mask": padding_of(n, length)},
            "causal": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(length)},
            "hint": {"attn_mask": torch.ones(length, length, dtype=torch.bool).triu(1), "is_causal": True},
        }[masked]
        with torch.set_grad_enabled(training):
            got, expected = (f(x, x, x, **masks, **options) for f in (compiled, m))
        assert_close(got[0], expected[0])
        if options["need_weights"]:
            assert_close(got[1], expected[1])
    assert counter.frame_count == 1


@pytest.mark.parametrize("engine", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("need_weights", [True, False])
def test_compiled_gradients(engine: str, need_weights: bool) -> None:
    m = nn.ModuleList([module(), module()])

    def run(x: Tensor) -> Tensor:
        for layer in m:
            x = x + layer(x, x, x, need_weights=need_weights)[0]
        return x

    grads = []
    for f in (run, torch.compile(run, fullgraph=True, dynamic=True, backend=engine)):
        x = torch.randn(2, 5, E, generator=torch.Generator().manual_seed(1)).requires_grad_()
        m.zero_grad()
        f(x).square().sum().backward()
        grads.append((x.grad, *(p.grad for p in m.parameters())))
    for ours, eager in zip(*grads, strict=True):
        assert_close(ours, eager)


def test_compiled_extras() -> None:
    m = module(num_kv_heads=2, window=(3, 1), rotary=attn.Rotary(4), masked_rows="nan")
    compiled = torch.compile(m, fullgraph=True, dynamic=True, backend=(counter := CompileCounter()))
    for n, length in SIZES:
        x = torch.randn(n, length, E)
        assert_close(compiled(x, x, x)[0], m(x, x, x)[0])
    assert counter.frame_count == 1


class Model(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = module()
        self.need_weights = need_weights

    def forward(self, x: Tensor, padding: Tensor) -> Any:
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=self.need_weights)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_export_with_dynamic_sizes(strict: bool, need_weights: bool) -> None:
    model = Model(need_weights).eval()
    x = torch.randn(3, 7, E)
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=2, max=64)}
    program = torch.export.export(model, (x, padding_of(3, 7)), dynamic_shapes=(sizes, sizes), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n, length in SIZES:
        x = torch.randn(n, length, E)
        assert_close(loaded(x, padding_of(n, length))[0], model(x, padding_of(n, length))[0])


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode: str) -> None:
    m = module().eval()
    x = torch.randn(3, 7, E)
    parameters = dict(m.named_parameters())

    def run(parameters: dict[str, Tensor], x: Tensor, padding: Tensor) -> Tensor:
        return torch.func.functional_call(m, parameters, (x, x, x), {"key_padding_mask": padding})[0]

    graph = make_fx(run, tracing_mode=mode)(parameters, x, padding_of(3, 7))
    other = ~padding_of(3, 7).flip(1) & padding_of(3, 7)  # another mask: nothing of the first was burnt in
    assert_close(graph(parameters, x, other), m(x, x, x, key_padding_mask=other)[0])


class Block(nn.Module):
    def __init__(self, kind: type[nn.MultiheadAttention]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(E)
        self.attention = kind(E, H, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        out, _ = self.attention(y, y, y, key_padding_mask=padding, need_weights=False)
        return x + out


def test_symbolic_trace_keeps_the_module_whole() -> None:
    graphs = []
    for kind in (attn.MultiheadAttention, nn.MultiheadAttention):
        torch.manual_seed(0)
        block = Block(kind)
        traced = torch.fx.symbolic_trace(block)
        calls = [n for n in traced.graph.nodes if n.op == "call_module"]
        assert [str(n.target) for n in calls] == ["norm", "attention"]
        x = torch.randn(2, 5, E)
        for p in (None, padding_of(2, 5)):
            assert_close(traced(x, p), block(x, p))
        graphs.append([(n.op, str(n.target)) for n in traced.graph.nodes])
    assert graphs[0] == graphs[1]


def test_symbolic_trace_with_a_constant_query() -> None:
    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.probe = nn.Parameter(torch.randn(2, 1, E))
            self.attention = module()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(self.probe, x, x)[0]

    probe = Probe()
    x = torch.randn(2, 5, E)
    assert_close(torch.fx.symbolic_trace(probe)(x), probe(x))
