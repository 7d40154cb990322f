"""Our module inside PyTorch's transformers: put there by hand and by `replace`, in training and in eval, called each
time, with blocks really skipped."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attn
from attn import functional, masks
from attn.spec import Operands
from attn.testing import assert_close

E, H, N, L, S = 16, 2, 3, 6, 8

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def by_hand(model: nn.Module) -> nn.Module:
    """The model with every attention exchanged for a module of ours that was made anew."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.MultiheadAttention:
                mine = attn.MultiheadAttention(E, H, child.dropout, batch_first=child.batch_first)
                mine.load_state_dict(child.state_dict())
                setattr(parent, name, mine.train(child.training))
    return model


WAYS = {
    "by hand": by_hand,
    "replaced": attn.replace,
    "deepcopy": lambda m: copy.deepcopy(attn.replace(m)),
    "pickle": lambda m: pickle.loads(pickle.dumps(by_hand(m))),
}


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 24, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2)


def counted(model: nn.Module) -> list[str]:
    """The names of our modules, each time one is called."""
    calls: list[str] = []
    for name, m in model.named_modules():
        if isinstance(m, attn.MultiheadAttention):
            m.register_forward_pre_hook(lambda m, a, name=name: calls.append(name))
    return calls


def padding(length: int = L) -> Tensor:
    return torch.arange(length) >= torch.tensor([length, 2, length - 1])[:, None]


def gradients(model: nn.Module, out: Tensor, g: Tensor) -> list[Tensor]:
    model.zero_grad()
    (out * g).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("masked", ["", "padding", "causal", "both"])
def test_encoder(way: str, training: bool, grad: bool, masked: str) -> None:
    model = encoder().train(training)
    x = torch.randn(N, L, E)
    arguments: dict[str, Tensor] = {}
    if masked in ("padding", "both"):
        arguments["src_key_padding_mask"] = padding()
    if masked in ("causal", "both"):
        arguments["mask"] = torch.ones(L, L, dtype=torch.bool).triu(1)
    live = ~padding() if "src_key_padding_mask" in arguments else torch.ones(N, L, dtype=torch.bool)
    with torch.set_grad_enabled(grad):
        expected = model(x, **arguments)
        theirs = gradients(model, expected[live], x[live]) if grad else []
        ours = WAYS[way](copy.deepcopy(model))
        calls = counted(ours)
        out = ours(x, **arguments)
        mine = gradients(ours, out[live], x[live]) if grad else []
    assert calls == ["layers.0.self_attn", "layers.1.self_attn"]
    assert out.shape == expected.shape
    assert_close(out[live], expected[live])
    assert len(mine) == len(theirs)
    scale = max((t.abs().max() for t in theirs), default=torch.ones(()))
    for a, b in zip(mine, theirs, strict=True):
        # Gradients of biases before a normalisation cancel: rounding is of the size of the largest gradient.
        assert_close(torch.cat([a.flatten(), scale[None]]), torch.cat([b.flatten(), scale[None]]))


def test_nested_path_pads_with_zeros_as_pytorch_does() -> None:
    model = encoder().eval()
    x = torch.randn(N, L, E)
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding())
        nested: list[bool] = []
        attn.replace(model)
        for layer in model.layers:
            layer.self_attn.register_forward_pre_hook(lambda m, a: nested.append(a[0].is_nested))
        out = model(x, src_key_padding_mask=padding())
    assert nested == [True, True]
    assert not out[padding()].any()
    assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("average", [True, False])
def test_nested_input_to_the_module(dtype: torch.dtype, average: bool) -> None:
    stock = nn.MultiheadAttention(E, H, batch_first=True, dtype=dtype).eval()
    m = attn.MultiheadAttention(E, H, batch_first=True, dtype=dtype).eval()
    m.load_state_dict(stock.state_dict())
    parts = [torch.randn(n, E, dtype=dtype) for n in (3, 1, 5)]
    x = torch.nested.nested_tensor(parts)
    with torch.no_grad():
        out, weights = m(x, x, x, average_attn_weights=average)
        assert m(x, x, x, need_weights=False)[1] is None
    assert out.is_nested
    for n, (part, mine) in enumerate(zip(parts, out.unbind(), strict=True)):
        expected, expected_weights = stock(part, part, part, average_attn_weights=average)
        assert_close(mine, expected)
        length = part.shape[0]
        assert_close(weights[n][..., :length, :length], expected_weights)
        assert not weights[n][..., length:, :].any()
        assert not weights[n][..., length:].any()


def test_nested_input_trains() -> None:
    """PyTorch's module refuses it outside of its fast path."""
    m = attn.MultiheadAttention(E, H, batch_first=True)
    parts = [torch.randn(n, E) for n in (3, 5)]
    x = torch.nested.nested_tensor(parts)
    out = m(x, x, x, need_weights=False)[0]
    out.to_padded_tensor(0.0).square().sum().backward()
    found = m.in_proj_weight.grad.clone()
    m.zero_grad()
    sum(m(part, part, part)[0].square().sum() for part in parts).backward()
    assert_close(found, m.in_proj_weight.grad)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("training", [True, False])
def test_decoder(way: str, training: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(E, H, 24, dropout=0.0, batch_first=True)
    model = nn.TransformerDecoder(layer, 2).train(training)
    x, memory = torch.randn(N, L, E), torch.randn(N, S, E)
    arguments = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(L),
        "tgt_key_padding_mask": torch.zeros(N, L).masked_fill(padding(), -torch.inf),
        "memory_key_padding_mask": padding(S),
    }
    expected = model(x, memory, **arguments)
    ours = WAYS[way](copy.deepcopy(model))
    calls = counted(ours)
    assert_close(ours(x, memory, **arguments), expected)
    assert len(calls) == 4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer(way: str, training: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(E, H, 2, 2, 24, dropout=0.0, batch_first=batch_first).train(training)
    source, target = torch.randn(N, S, E), torch.randn(N, L, E)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    arguments = {
        "tgt_mask": torch.ones(L, L, dtype=torch.bool).triu(1),
        "src_key_padding_mask": padding(S),
        "memory_key_padding_mask": padding(S),
        "tgt_is_causal": True,
    }
    with torch.set_grad_enabled(training):
        expected = model(source, target, **arguments)
        ours = WAYS[way](copy.deepcopy(model))
        calls = counted(ours)
        out = ours(source, target, **arguments)
    assert len(calls) == 6
    assert_close(out, expected)


def test_stock_modules_elsewhere_keep_their_fast_path() -> None:
    model = nn.ModuleList([encoder(), encoder()]).eval()
    attn.replace(model[0])
    x = torch.randn(N, L, E)
    called = []
    for layer in model[1].layers:
        plain = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, plain=plain, **k: called.append(1) or plain(*a, **k)
    with torch.no_grad():
        assert_close(model[0](x), model[1](x))
    assert called == []


def skipped(run: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch, tile: int) -> list[list[int]]:
    """Per attention call: [empty, partial, full] tiles of the operands that were really used."""
    seen: list[Operands] = []
    real = functional.checked

    def checked(*args: Any, **kwargs: Any) -> Operands:
        x = real(*args, **kwargs)
        seen.append(x)
        return x

    monkeypatch.setattr(functional, "checked", checked)
    monkeypatch.setattr(functional.planner, "recall", lambda key: None)  # else repeated calls are not checked again
    run()
    classes = [masks.tile_classes(x, tile, tile) for x in seen]
    assert all(x.keep is None and x.bias is None for x in seen)
    return [[int((c == kind).sum()) for kind in (masks.EMPTY, masks.PARTIAL, masks.FULL)] for c in classes]


@pytest.mark.parametrize("training", [True, False])
def test_blocks_skipped_in_a_padded_encoder(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attn.replace(encoder().train(training))
    length, lengths = 64, torch.tensor([64, 16, 33])
    x, hidden = torch.randn(N, length, E), torch.arange(length) >= lengths[:, None]
    with torch.set_grad_enabled(training):
        found = skipped(lambda: model(x, src_key_padding_mask=hidden), monkeypatch, 16)
    # 4 x 4 tiles of each sequence: 4, 1 and 3 columns of tiles hold keys; nested input hides padded queries too.
    columns = [(4, 0), (1, 0), (2, 1)]
    if training:
        empty = sum(4 * (4 - full - part) for full, part in columns)
        partial = sum(4 * part for _, part in columns)
        expected = [empty, partial, 3 * 16 - empty - partial]
    else:
        expected = [48 - 16 - 1 - 9, 5, 16 + 1 + 4]
    assert found == [expected, expected]


@pytest.mark.parametrize("hint", [True, None])
def test_blocks_skipped_in_a_causal_decoder(hint: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = attn.replace(nn.Transformer(E, H, 1, 2, 24, dropout=0.0, batch_first=True))
    source, target = torch.randn(1, 32, E), torch.randn(1, 64, E)
    mask = nn.Transformer.generate_square_subsequent_mask(64)
    found = skipped(lambda: model(source, target, tgt_mask=mask, tgt_is_causal=hint), monkeypatch, 16)
    # Encoder, then twice: causal self-attention of 4 x 4 tiles (6 above the diagonal, 4 on it), attention to memory.
    assert found == [[0, 0, 4], [6, 4, 6], [0, 0, 8], [6, 4, 6], [0, 0, 8]]


def test_every_combination_of_layer_options() -> None:
    x = torch.randn(N, L, E)
    for first, activation, bias in itertools.product((True, False), ("relu", "gelu"), (True, False)):
        model = encoder(norm_first=first, activation=activation, bias=bias).eval()
        with torch.no_grad():
            expected = model(x)
            calls = counted(attn.replace(model))
            assert_close(model(x), expected)
        assert len(calls) == 2
