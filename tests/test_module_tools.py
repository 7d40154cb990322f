"""Our module under what people do to modules: hooks, pruning, parametrizations, transforms, checkpoints, wrappers."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize, prune, stateless
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.utils.checkpoint import checkpoint

import attn
from attn.testing import assert_close

E, H, N, L = 16, 4, 3, 5


def pair(**ctor: Any) -> tuple[nn.MultiheadAttention, attn.MultiheadAttention]:
    stock = nn.MultiheadAttention(E, H, batch_first=True, **ctor)
    ours = attn.MultiheadAttention(E, H, batch_first=True, **ctor)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def x_of(*shape: int) -> Tensor:
    return torch.randn(*(shape or (N, L, E)), generator=torch.Generator().manual_seed(4))


# --- hooks and reparametrisation --------------------------------------------------------------------------


def test_hooks_fire_like_pytorchs() -> None:
    seen: dict[type, list[Any]] = {}
    for m in pair():
        log = seen.setdefault(type(m), [])
        m.register_forward_pre_hook(lambda m, a, kw, log=log: log.append(("pre", len(a), sorted(kw))), with_kwargs=True)
        m.register_forward_hook(lambda m, a, out, log=log: log.append(("forward", out[0].shape, out[1] is None)))
        m.register_full_backward_hook(
            lambda m, gi, go, log=log: log.append(("backward", [g is None for g in go], [g is None for g in gi]))
        )
        x = x_of().requires_grad_()
        m(x, x, x, need_weights=True)[0].sum().backward()
        m(x, x, x, need_weights=False)[0].sum().backward()
    theirs, ours = seen.values()
    assert len(ours) == 6
    assert ours == theirs


def settled(m: nn.Module) -> None:
    """After a call in training the norm is that of the weight; before, it is any number, and gradients cancel in it."""
    x = x_of()
    m.train()(x, x, x)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: prune.random_unstructured(m, "in_proj_weight", 0.5),
        lambda m: parametrizations.weight_norm(m, "in_proj_weight"),
        lambda m: parametrizations.spectral_norm(m, "in_proj_weight"),
        lambda m: parametrizations.orthogonal(m.out_proj, "weight"),
        lambda m: old_weight_norm(m, "in_proj_weight"),
        lambda m: settled(old_spectral_norm(m, "in_proj_weight", n_power_iterations=20)),
        lambda m: parametrize.register_parametrization(m, "in_proj_bias", nn.Tanh()),
    ],
    ids=["prune", "weight_norm", "spectral_norm", "orthogonal", "old weight_norm", "old spectral_norm", "parametrize"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_reparametrisations(change: Callable[[nn.Module], Any]) -> None:
    results = []
    g = torch.randn(N, L, E)
    for m in pair():
        torch.manual_seed(6)
        change(m)
        assert isinstance(m, nn.MultiheadAttention)
        m.eval()  # in training, spectral_norm takes a step at each look at the weight, and PyTorch looks more often
        x = x_of().requires_grad_()
        out = m(x, x, x, need_weights=False)[0]
        (out * g).sum().backward()
        results.append((out, x.grad, *(p.grad for p in m.parameters())))
    for theirs, ours in zip(*results, strict=True):
        assert_close(ours, theirs)


def test_replaced_parts_take_effect() -> None:
    _, m = pair()
    x = x_of()
    m(x, x, x)
    m.out_proj = nn.Linear(E, 3)
    assert m(x, x, x)[0].shape == (N, L, 3)
    m.in_proj_weight = nn.Parameter(torch.zeros_like(m.in_proj_weight))
    assert_close(m(x, x, x)[1], torch.full((N, L, L), 1 / L))


def test_out_proj_is_read_and_never_called() -> None:
    stock, m = pair()

    def refuse(*args: object) -> Tensor:
        raise RuntimeError("called")

    x = x_of()
    m.out_proj.forward = refuse  # type: ignore[method-assign]
    assert_close(m(x, x, x)[0], stock(x, x, x)[0])


def test_saved_and_loaded_whole() -> None:
    _, m = pair()
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    x = x_of()
    assert torch.equal(other(x, x, x)[0], m(x, x, x)[0])
    assert len(other._forward_hooks) == 1


# --- torch.func and autograd ------------------------------------------------------------------------------


def test_functional_call() -> None:
    stock, m = pair()
    x = x_of()
    doubled = {n: 2 * p.detach() for n, p in m.named_parameters()}
    ours = torch.func.functional_call(m, doubled, (x, x, x))[0]
    assert_close(ours, torch.func.functional_call(stock, doubled, (x, x, x))[0])
    assert_close(stateless.functional_call(m, doubled, (x, x, x))[0], ours)


@pytest.mark.parametrize("need_weights", [True, False])
def test_vmap_jacrev_and_per_sample_gradients(need_weights: bool) -> None:
    stock, m = pair()
    x = x_of(4, N, L, E)

    def run(module: nn.Module, x: Tensor) -> Tensor:
        return module(x, x, x, need_weights=need_weights)[0]

    assert_close(torch.vmap(lambda t: run(m, t))(x), torch.stack([run(stock, t) for t in x]))
    small = x_of(1, 2, E)
    assert_close(torch.func.jacrev(lambda t: run(m, t))(small), torch.func.jacrev(lambda t: run(stock, t))(small))

    def loss(module: nn.Module, parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        out = torch.func.functional_call(module, parameters, (sample,) * 3, {"need_weights": need_weights})[0]
        return out.square().sum()

    grads = []
    for module in (m, stock):
        parameters = {n: p.detach() for n, p in module.named_parameters()}
        per_sample = torch.vmap(torch.func.grad(lambda p, s, module=module: loss(module, p, s)), (None, 0))
        grads.append(per_sample(parameters, x))
    for name, ours in grads[0].items():
        assert_close(ours, grads[1][name], name)


@pytest.mark.parametrize("need_weights", [True, False])
def test_vmap_over_masks(need_weights: bool) -> None:
    stock, m = pair()
    x, mask = x_of(), torch.rand(4, L, L) < 0.3
    mask[..., 0] = False
    together = torch.vmap(lambda t: m(x, x, x, attn_mask=t, need_weights=need_weights)[0])(mask)
    assert_close(together, torch.stack([stock(x, x, x, attn_mask=t)[0] for t in mask]))


def test_second_derivatives_and_forward_mode() -> None:
    """PyTorch's module has both with weights only (docs/differences.md)."""
    stock, m = (t.double() for t in pair())
    x = x_of(1, 3, E).double()
    tangent = torch.randn_like(x)
    results = []
    for module, need_weights in ((m, False), (m, True), (stock, True)):

        def run(t: Tensor, module: nn.Module = module, need_weights: bool = need_weights) -> Tensor:
            return module(t, t, t, need_weights=need_weights)[0].square().sum()

        _, jvp = torch.func.jvp(run, (x,), (tangent,))
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(run(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad((grad * tangent).sum(), leaf)
        results.append((jvp, second))
    for got in results[:2]:
        assert_close(got[0], results[2][0])
        assert_close(got[1], results[2][1])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_checkpointing_with_dropout_gives_the_same_gradients(reentrant: bool, need_weights: bool) -> None:
    m = attn.MultiheadAttention(E, H, dropout=0.4, batch_first=True)
    found = []
    for recompute in (False, True):
        m.zero_grad()
        x = x_of().requires_grad_()
        torch.manual_seed(7)

        def run(t: Tensor) -> Tensor:
            out, weights = m(t, t, t, need_weights=need_weights)
            return out if weights is None else out + weights.sum(-1, keepdim=True)

        out = checkpoint(run, x, use_reentrant=reentrant) if recompute else run(x)
        out.square().sum().backward()
        found.append((out.detach(), x.grad, *(p.grad for p in m.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- autocast ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_autocast(need_weights: bool, training: bool) -> None:
    m = attn.MultiheadAttention(E, H, batch_first=True, add_bias_kv=True).train(training)
    x = x_of().requires_grad_()
    mask = torch.zeros(L, L).masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -torch.inf)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = m(x, x, x, attn_mask=mask, need_weights=need_weights)
    assert out.dtype == torch.bfloat16
    assert weights is None or weights.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in m.parameters())
    full = m(x, x, x, attn_mask=mask)[0]
    assert_close(out, full)


# --- wrappers of torch.distributed ------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available() or os.name == "nt", reason="needs torch.distributed with gloo")
@pytest.mark.parametrize("wrapper", ["ddp", "fully_shard"])
def test_distributed_wrappers(one_process: None, wrapper: str) -> None:
    stock, m = pair()
    x = x_of()
    expected = stock(x, x, x)[0]
    expected.sum().backward()
    if wrapper == "ddp":
        wrapped: nn.Module = nn.parallel.DistributedDataParallel(m)
    else:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        wrapped = fully_shard(m, mesh=mesh)
        assert isinstance(wrapped, attn.MultiheadAttention)
    out = wrapped(x, x, x)[0]
    out.sum().backward()
    assert_close(out, expected)
    grad = m.in_proj_weight.grad
    assert_close(grad.full_tensor() if hasattr(grad, "full_tensor") else grad, stock.in_proj_weight.grad)


# --- TorchScript ------------------------------------------------------------------------------------------


def test_jit_script_needs_restore() -> None:
    stock, m = pair()
    x = x_of()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(RuntimeError, match=r"attn\.restore\(model\) first"):
            torch.jit.script(nn.Sequential(m))
        scripted = torch.jit.script(attn.restore(m))
    assert_close(scripted(x, x, x)[0], stock(x, x, x)[0])


@pytest.mark.parametrize("need_weights", [True, False])
def test_jit_trace(need_weights: bool) -> None:
    _, m = pair()
    m.eval()
    x = x_of()
    mask = torch.zeros(L, L, dtype=torch.bool)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = m

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.m(x, x, x, attn_mask=mask, need_weights=need_weights)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Wrapped(), (x, mask))
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)  # another mask: the trace may not have looked at the first
    assert_close(traced(x, causal), m(x, x, x, attn_mask=causal)[0])
