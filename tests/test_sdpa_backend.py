"""The `sdpa` backend: it is right where it serves, and each of its refusals has a reason that still holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

import attn
from attn import reference
from attn.backends import load
from attn.backends.sdpa import REFUSED
from attn.spec import AttentionSpec, Operands
from attn.testing import Case, assert_case, assert_close, assert_module_close, cases, oracle, run_case, spy
from attn.testing.laws import values_gradient

BASE = AttentionSpec(head_dim=8, value_dim=8)
SIZES = (1, 2, 3, 5, 8, 16, 17, 33, 48)


def servable(case: Case) -> Case:
    """The case without what sdpa never does; gradients of a bias on CPU too."""
    spec = case.spec._replace(dropout=False, softcap=False, lse=False, weights="", scale_positive=True)
    if spec.bias:
        spec = spec._replace(grad=False, bias_grad=False)
    return dataclasses.replace(case, spec=spec, scale=0.0)


@pytest.mark.parametrize("part", range(4))
def test_right_wherever_it_serves(part: int) -> None:
    served = 0
    for case in map(servable, cases(160, 21, sizes=SIZES)[part::4]):
        if case.kind in ("hidden_nan", "visible_nan"):
            continue
        assert load("sdpa").why_not(case.spec) is None
        assert_case(case, "sdpa")
        served += 1
    assert served >= 20


@pytest.mark.parametrize("feature", sorted(REFUSED))
def test_refused_features_are_named(feature: str) -> None:
    reason = load("sdpa").why_not(BASE._replace(**{feature: "mean" if feature == "weights" else True}))
    assert reason is not None
    assert reason.startswith("does not do")


@pytest.mark.parametrize("op", ["varlen", "decode"])
def test_refused_calls(op: str) -> None:
    assert load("sdpa").why_not(BASE._replace(op=op)) == f"does not do {op} calls"


def test_scale_of_zero_or_less_is_refused_because_pytorch_gives_nan() -> None:
    assert "scale <= 0" in str(load("sdpa").why_not(BASE._replace(scale_positive=False)))
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    for scale in (0.0, -0.25):
        assert F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).isnan().any(), "PyTorch has changed"
        ours = attn.attention(q, k, v, mask=attn.masks.causal(), scale=scale)
        assert ours.isfinite().all()


def test_gradients_with_a_float_mask_are_refused_on_cpu_because_they_are_wrong() -> None:
    spec = BASE._replace(bias=True, grad=True)
    assert "finfo.min" in str(load("sdpa").why_not(spec))
    assert load("sdpa").why_not(spec._replace(grad=False)) is None
    low = torch.full((6, 16), torch.finfo(torch.float32).min)
    q, k, v = (torch.randn(1, 1, n, 8) for n in (6, 16, 16))
    d_out = torch.ones(1, 1, 6, 8)
    x = Operands(q, k, v)
    alive = torch.ones(1, 1, 6)
    pytorchs, ours = v.clone().requires_grad_(), v.clone().requires_grad_()
    F.scaled_dot_product_attention(q, k, pytorchs, low).backward(d_out)
    assert pytorchs.grad is not None
    assert not values_gradient(x, pytorchs.grad, d_out, alive).passed, "PyTorch has changed: the refusal may go"
    with spy() as calls:
        attn.attention(q, k, ours, bias=low).backward(d_out)
    assert ours.grad is not None
    assert values_gradient(x, ours.grad, d_out, alive).passed
    assert ("sdpa", "call") not in calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_the_lowest_number_are_right_forward(dtype: torch.dtype) -> None:
    line = "attention cpu float32 head_dim=8 value_dim=8 bias | B=2 Hq=3 Hkv=3 L=5 S=17 kind=finfo_min seed=3"
    case = Case.parse(line.replace("float32", str(dtype).removeprefix("torch.")))
    assert_case(case, "sdpa")


def test_dead_rows_are_zero_in_both_directions() -> None:
    line = "attention cpu float32 head_dim=8 value_dim=8 keep grad | B=2 Hq=3 Hkv=3 L=5 S=17 kind=dead seed=3"
    case = Case.parse(line)
    x = case.operands()
    assert isinstance(x, Operands)
    dead = reference.forward(x)[2] == 0
    assert dead.any()
    results = run_case(case, "sdpa")
    assert results.dq is not None
    assert not results.out[dead].any()
    assert not results.dq[dead].any()


def test_an_output_gradient_past_the_query_lengths_is_never_read() -> None:
    line = "attention cpu float32 head_dim=8 value_dim=8 query_lengths key_lengths grad | "
    for seed in range(4):
        assert_case(Case.parse(f"{line}B=3 Hq=2 Hkv=2 L=7 S=9 kind=past_nan seed={seed}"), "sdpa")


def test_known_exceptions_still_hold() -> None:
    """Two rows of docs/differences: a NaN query, and NaN keys hidden by a mask, are PyTorch's business."""
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    q[0, 1, 2, 3] = torch.nan
    assert not F.scaled_dot_product_attention(q, k, v).isnan().any(), "PyTorch's CPU kernel now keeps a visible NaN"
    assert oracle(Operands(q, k, v))["out"].value.isnan().any()
    q = torch.randn(1, 2, 6, 8)
    keep = torch.arange(6) < 5
    k[..., 5, :] = torch.nan
    assert F.scaled_dot_product_attention(q, k, v, keep[None]).isnan().any(), "PyTorch's CPU kernel now hides NaN keys"


def test_no_mask_and_causal_go_without_a_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    original = F.scaled_dot_product_attention

    def watch(*args: object, **kwargs: object) -> torch.Tensor:
        given.append(args[3] if len(args) > 3 else None)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    attn.attention(q, k, v, backend="sdpa")
    attn.attention(q, k, v, mask=attn.masks.causal(), backend="sdpa")
    attn.attention(q, k, v, mask=attn.masks.causal("end"), backend="sdpa")
    assert given == [None, None, None]
    attn.attention(q, k[:, :, :4], v[:, :, :4], mask=attn.masks.causal("end"), backend="sdpa")
    assert isinstance(given[-1], torch.Tensor)


def test_a_broadcast_mask_is_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    original = F.scaled_dot_product_attention

    def watch(q: object, k: object, v: object, mask: torch.Tensor, **kwargs: object) -> torch.Tensor:
        shapes.append(tuple(mask.shape))
        return original(q, k, v, mask, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    q, k, v = torch.randn(3, 4, 2, 6, 8)
    attn.attention(q, k, v, mask=attn.masks.window(2, 0), backend="sdpa")
    attn.attention(q, k, v, mask=attn.masks.padding(torch.tensor([1, 2, 3, 4])), backend="sdpa")
    assert shapes == [(1, 1, 6, 6), (4, 1, 1, 6)]


@pytest.mark.parametrize("length", [5, 16, 50])
@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_masks_of_another_dtype_are_read_right(dtype, mask_dtype, length):
    q, k, v = (torch.randn(1, 2, length, 8).to(dtype) for _ in range(3))
    bias = torch.randn(length, length).to(mask_dtype)
    found = attn.attention(q, k, v, bias=bias, backend="sdpa")
    exact = attn.attention(q.double(), k.double(), v.double(), bias=bias.double(), backend="reference")
    assert found.dtype == dtype
    assert_module_close(found, exact, attn.attention(q, k, v, bias=bias, backend="reference"))


def test_autocast_does_not_round_masks():
    q = torch.randn(1, 1, 2, 8)
    bias = torch.full((2, 2), torch.finfo(torch.float32).min)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = (attn.attention(q, q, q, bias=bias, backend=b) for b in ("sdpa", "reference"))
    assert (found != 0).all()
    assert_close(found, expected)
