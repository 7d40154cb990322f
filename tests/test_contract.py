"""What every public call promises: right on random calls, nothing changed behind the caller's back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attn
from attn import planner
from attn.backends import load
from attn.testing import assert_public_case, cases, spy

SIZES = (1, 2, 3, 5, 8, 17, 33)
AVAILABLE = [n for n in planner.names() if load(n).available() is None]


@pytest.mark.parametrize("part", range(4))
def test_random_calls_by_the_public_functions(part: int) -> None:
    for case in cases(100, 71, ops=("attention", "varlen", "decode"), sizes=SIZES)[part::4]:
        if case.kind in ("hidden_nan", "visible_nan") and load("sdpa").why_not(case.spec) is None:
            continue  # PyTorch treats NaN in its own way
        with spy() as calls:
            assert_public_case(case)
        assert {name for name, _ in calls} <= set(AVAILABLE)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_forced_backends_run_or_say_why(backend: str) -> None:
    for case in cases(50, 73, ops=("attention", "varlen", "decode"), sizes=SIZES):
        if load(backend).whole_call and case.kind in ("hidden_nan", "visible_nan"):
            continue
        reason = load(backend).why_not(case.spec._replace(grad=case.has_gradients))
        if reason is None and not (case.spec.op == "varlen" and load(backend).why_not(case.spec._replace(lse=True))):
            with spy() as calls:
                assert_public_case(case, backend)
            assert {name for name, _ in calls} <= {backend}
        else:
            with pytest.raises(RuntimeError, match=f"backend '{backend}' was asked for and cannot run this call"):
                assert_public_case(case, backend)


def qkv() -> list[torch.Tensor]:
    return [torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)]


MASK = attn.masks.window(2, 0) & attn.masks.padding(torch.tensor([5, 3])) & attn.masks.dense(torch.ones(5, 5) > 0)
CALLS: dict[str, Callable[..., Any]] = {
    "attention": lambda q, k, v, **more: attn.attention(q, k, v, mask=MASK, bias=more.pop("bias", None), **more),
    "scaled_dot_product_attention": lambda q, k, v, **more: attn.scaled_dot_product_attention(
        q, k, v, enable_gqa=True, dropout_p=more.get("dropout_p", 0.0)
    ),
    "varlen_attention": lambda q, k, v, **more: attn.varlen_attention(
        q[0].transpose(0, 1),
        k[0].transpose(0, 1),
        v[0].transpose(0, 1),
        cu_seqlens_q=torch.tensor([0, 2, 5], dtype=torch.int32),
        cu_seqlens_k=torch.tensor([0, 4, 5], dtype=torch.int32),
        **more,
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("grad", [False, True])
def test_inputs_are_not_mutated(name: str, dropout_p: float, grad: bool) -> None:
    given = [t.requires_grad_(grad) for t in qkv()]
    copies, versions = [t.detach().clone() for t in given], [t._version for t in given]
    out = CALLS[name](*given, dropout_p=dropout_p)
    if grad:
        out.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))
    assert [t._version for t in given] == versions


def test_decode_does_not_mutate() -> None:
    q, k, v = qkv()
    given = [q[:, :, :1].clone(), k, v, torch.tensor([5, 2], dtype=torch.int32)]
    versions = [t._version for t in given]
    attn.decode_attention(*given[:3], lengths=given[3])
    assert [t._version for t in given] == versions


@pytest.mark.parametrize("name", CALLS)
def test_random_numbers_are_drawn_for_dropout_alone(name: str) -> None:
    given = qkv()
    before = torch.get_rng_state()
    CALLS[name](*given)
    assert torch.equal(torch.get_rng_state(), before)
    first = CALLS[name](*given, dropout_p=0.5)
    assert not torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(CALLS[name](*given, dropout_p=0.5), first)
    torch.set_rng_state(before)
    assert torch.equal(CALLS[name](*given, dropout_p=0.5), first)


@pytest.mark.parametrize(
    "wrong",
    [{"softcap": -1.0}, {"dropout_p": 1.5}, {"backend": "nothing"}, {"bias": torch.zeros(3, 3)}, {"scale": torch.nan}],
)
def test_a_refused_call_leaves_no_trace(wrong: dict[str, Any]) -> None:
    given, before = qkv(), torch.get_rng_state()
    with spy() as calls, pytest.raises((ValueError, TypeError)):
        attn.attention(*given, mask=MASK, **{"dropout_p": 0.5, **wrong})
    assert calls == []
    assert torch.equal(torch.get_rng_state(), before)


def test_a_backend_that_cannot_draws_no_seed() -> None:
    given, before = qkv(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="does not do dropout"):
        attn.attention(*given, dropout_p=0.5, backend="sdpa")
    assert torch.equal(torch.get_rng_state(), before)
    assert planner.state.forced is None


def test_all_dropped_is_zero_forward_and_backward() -> None:
    q, k, v = (t.requires_grad_() for t in qkv())
    out = attn.attention(q, k, v, dropout_p=1.0)
    out.sum().backward()
    assert not out.any()
    assert not v.grad.any()  # type: ignore[union-attr]


def test_out_is_laid_out_for_the_output_projection() -> None:
    for backend in (n for n in AVAILABLE if not load(n).whole_call):
        out = attn.attention(*qkv(), backend=backend)
        assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr(), backend


@pytest.mark.parametrize("subset", ["q", "k", "v", "qk", "qv", "kv", "bias", "q bias"])
def test_each_subset_of_inputs_may_require_grad(subset: str) -> None:
    q, k, v = qkv()
    tensors = {"q": q, "k": k, "v": v, "bias": torch.randn(4, 5, 5)}
    whole = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    attn.attention(whole["q"], whole["k"], whole["v"], bias=whole["bias"]).square().sum().backward()
    wanted = {"bias"} if subset == "bias" else {"q", "bias"} if subset == "q bias" else set(subset)
    some = {n: t.clone().requires_grad_(n in wanted) for n, t in tensors.items()}
    attn.attention(some["q"], some["k"], some["v"], bias=some["bias"]).square().sum().backward()
    for name, t in some.items():
        assert (t.grad is None) == (name not in wanted)
        assert t.grad is None or torch.equal(t.grad, whole[name].grad)  # type: ignore[arg-type]
