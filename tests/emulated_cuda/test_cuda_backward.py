"""The CUDA backward: sums over broadcast dims, residuals of other backends, boundaries of tiles, what must stay 0."""

from __future__ import annotations

import dataclasses
import re

import pytest
import stride_zero
import torch
from torch import Tensor

from attn import rng
from attn.backends import load
from attn.backends.base import Forward, Gradients
from attn.spec import Operands
from attn.testing import assert_case, assert_close, assert_gradients, assert_verdicts, laws, oracle
from attn.testing.matrix import DTYPES, situation

CUDA = load("cuda")


def call(L: int = 40, S: int = 67, D: int = 16, H: int = 2, **more: object) -> Operands:
    q, k, v = torch.randn(1, H, L, D), torch.randn(1, H, S, D), torch.randn(1, H, S, D)
    return Operands(q, k, v, scale=D**-0.5)._replace(**more)  # type: ignore[arg-type]


def backward(x: Operands, residuals: Forward, d_out: Tensor) -> Gradients:
    return CUDA.backward(x, residuals, d_out, None, None, x.bias is not None)


BROADCASTS = ("bhij", "hij", "bij", "ij", "j", "hi", "b", "", "hj", "bh", "i", "bj")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", BROADCASTS)
def test_gradient_of_a_broadcast_bias(kept: str, dtype: torch.dtype) -> None:
    """With the same bits every time."""
    x = situation("bias", dtype, L=70, S=65).operands()
    shape = tuple(n if c in kept else 1 for n, c in zip((2, 2, 70, 65), "bhij", strict=True))
    x = x._replace(bias=torch.randn(shape).to(dtype))
    residuals = CUDA.forward(x)
    d_out, d_lse = torch.randn(residuals[0].shape).to(dtype), torch.randn_like(residuals[1])
    first = CUDA.backward(x, residuals, d_out, d_lse, None, True)
    again = CUDA.backward(x, residuals, d_out, d_lse, None, True)
    assert first[3] is not None
    assert again[3] is not None
    assert first[3].shape == shape
    assert torch.equal(first[3], again[3])
    assert_gradients(oracle(x, (d_out, d_lse, None)), *first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kept", ["bhij", "j"])
def test_the_gradient_of_a_bias_has_its_dtype(kept: str, dtype: torch.dtype) -> None:
    x = call(bias=torch.randn([n if c in kept else 1 for n, c in zip((1, 2, 40, 67), "bhij", strict=True)]).to(dtype))
    residuals = CUDA.forward(x)
    d_out = torch.randn_like(residuals[0])
    got = backward(x, residuals, d_out)[3]
    want = backward(x._replace(bias=x.bias.float()), residuals, d_out)[3]  # type: ignore[union-attr]
    assert got is not None
    assert want is not None
    assert torch.equal(got, want.to(dtype))


def test_without_a_wish_a_bias_has_no_gradient() -> None:
    x = situation("bias", torch.float32).operands()
    residuals = CUDA.forward(x)
    assert CUDA.backward(x, residuals, torch.ones_like(residuals[0]), None, None, False)[3] is None


NAMES = ("causal_end", "bias_finfo_min", "lengths", "dropout", "varlen_causal", "weights", "softcap", "documents")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", [("reference", "cuda"), ("cuda", "reference")], ids="-".join)
def test_residuals_are_interchangeable(name: str, way: tuple[str, str], dtype: torch.dtype) -> None:
    assert_case(situation(name, dtype), *way)


def test_a_shift_below_the_maximum_is_accepted() -> None:
    """A kernel may leave m up to 8 ln 2 below the row's maximum, with l to match."""
    x = call(right=0)
    out, m, l = CUDA.forward(x)
    d_out = torch.randn_like(out)
    lower = (out, m - 5.0, l * torch.exp(torch.tensor(5.0)))
    for a, b in zip(backward(x, lower, d_out)[:3], backward(x, (out, m, l), d_out)[:3], strict=True):
        assert_close(a, b)


EDGES = (15, 16, 17, 63, 64, 65, 127, 128, 129)
"""Around the rows of a warp, of a tile and of the padding of statistics."""


@pytest.mark.parametrize("n", EDGES)
@pytest.mark.parametrize("name", ["full", "causal_end", "window", "lengths", "prefix_window", "keep_causal", "dropout"])
def test_boundaries_of_tiles(name: str, n: int) -> None:
    dtype = DTYPES[n % 3]
    assert_case(situation(name, dtype, L=n, S=n + 1, B=1), "cuda")
    assert_case(situation(name, dtype, L=n + 1, S=n, B=1), "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(16, 64), (31, 33), (65, 12), (100, 100), (128, 96), (129, 8), (72, 256), (255, 255)])
@pytest.mark.parametrize("name", ["causal", "dropout"])
def test_head_dims(name: str, dims: tuple[int, int], dtype: torch.dtype) -> None:
    assert_case(situation(name, dtype, head_dim=dims[0], value_dim=dims[1], B=1, L=33, S=66), "cuda")


@pytest.mark.parametrize("layout", ["transposed", "sliced", "columns", "broadcast", "strided"])
@pytest.mark.parametrize("head_dim", [20, 33, 64])
def test_strides(layout: str, head_dim: int) -> None:
    for dtype in DTYPES:
        assert_case(dataclasses.replace(situation("causal", dtype, head_dim=head_dim), layout=layout), "cuda")


@pytest.mark.parametrize("dims", stride_zero.OUTPUT_DIMS)
def test_an_output_gradient_with_stride_zero(dims: tuple[int, ...]) -> None:
    stride_zero.assert_output_gradient(CUDA, call(), dims)


def test_gradients_of_lse_and_weights_with_stride_zero() -> None:
    stride_zero.assert_gradients_of_lse_and_weights(CUDA, call(right=0))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999999])
def test_dropout_keeps_the_bits_of_forward(p: float) -> None:
    """With q = 0 all probabilities are 1 / S, and what is not 0 was kept; d_out = the identity shows each one alone."""
    L = S = 72
    seed = torch.tensor([-81985529216486896, 1 << 62], dtype=torch.int64)
    x = call(L, S, S, rng=seed, dropout_p=p, q=torch.zeros(1, 2, L, S))
    keep = rng.keep_mask(seed, p, 1, 2, L, S)
    dv = backward(x, CUDA.forward(x), torch.eye(L).expand(1, 2, L, L))[2]
    assert torch.equal(dv.transpose(-1, -2) != 0, keep)


def test_dead_rows_are_zero() -> None:
    keep = torch.rand(1, 2, 40, 67) < 0.5
    keep[:, :, 5] = False
    keep[:, 1, 33:] = False
    x = call(keep=keep)
    residuals = CUDA.forward(x)
    dead = ~keep.any(-1)
    d_out = torch.randn_like(residuals[0]).masked_fill(dead[..., None], 7.0)
    dq, dk, dv, _ = backward(x, residuals, d_out)
    assert bool((dq[dead] == 0).all())
    zero = d_out.masked_fill(dead[..., None], 0.0)
    for a, b in zip((dq, dk, dv), backward(x, residuals, zero)[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    B, H, L, S = shape
    x = Operands(torch.randn(B, H, L, 8), torch.randn(B, H, S, 8), torch.randn(B, H, S, 8))
    residuals = CUDA.forward(x)
    for t, g in zip((x.q, x.k, x.v), backward(x, residuals, residuals[0])[:3], strict=True):
        assert g.shape == t.shape
        assert bool((g == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["hidden_nan", "visible_nan"])
@pytest.mark.parametrize("name", ["causal", "window", "prefix", "documents", "keep", "alibi_lengths"])
def test_nan(name: str, kind: str, dtype: torch.dtype) -> None:
    assert_case(situation(name, dtype, kind=kind), "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["lengths", "lengths_end"])
@pytest.mark.parametrize("more", [{}, {"bias": True, "bias_grad": True}, {"dropout": True, "weights": "mean"}], ids=str)
def test_nan_past_the_lengths_reaches_nothing(name: str, more: dict[str, object], dtype: torch.dtype) -> None:
    assert_case(situation(name, dtype, **{"kind": "past_nan", "L": 33, "S": 35} | more), "cuda")


def test_nan_past_the_last_packed_sequence_reaches_nothing() -> None:
    cu = {"cu_seqlens_q": torch.tensor([0, 9, 30]), "cu_seqlens_k": torch.tensor([0, 40, 50])}
    x = call(**{n: t.to(torch.int32) for n, t in cu.items()}, max_seqlen_q=21, max_seqlen_k=40)
    d_out = torch.randn(1, 2, 40, 16)
    clean = backward(x, CUDA.forward(x), d_out)
    for t, end in ((x.q, 30), (x.k, 50), (x.v, 50), (d_out, 30)):
        t[:, :, end:] = torch.nan
    dirty = backward(x, CUDA.forward(x), d_out)
    for a, b, end in zip(dirty[:3], clean[:3], (30, 50, 50), strict=True):
        assert a is not None
        assert torch.equal(a, b)
        assert bool((a[:, :, end:] == 0).all())


HOSTILE = ([0, 30, 9], [5, 9, 99], [-7, 50, 20], [0, 2**31 - 1, -(2**31)])


@pytest.mark.parametrize("cu", HOSTILE, ids=str)
def test_hostile_sequences_stay_inside_their_tensors(cu: list[int]) -> None:
    """The emulator stops at the first access outside a tensor or of scratch that nothing wrote."""
    bad = torch.tensor(cu, dtype=torch.int32)
    x = call(cu_seqlens_q=bad, cu_seqlens_k=bad)
    out = torch.zeros(1, 2, 40, 16)
    said = "GlobalGap"
    try:
        backward(x, (out, torch.zeros(1, 2, 40), torch.ones(1, 2, 40)), torch.ones_like(out))
    except RuntimeError as error:
        said = str(error)
    assert re.search("GlobalRace|GlobalGap", said)  # rows that such numbers give to two sequences, or to none


@pytest.mark.parametrize("lengths", [[-3], [99], [2**31 - 1]], ids=str)
def test_hostile_lengths_are_clamped(lengths: list[int]) -> None:
    bad = torch.tensor(lengths, dtype=torch.int32)
    x = call(key_lengths=bad, query_lengths=bad)
    clamped = x._replace(key_lengths=bad.clamp(0, 67), query_lengths=bad.clamp(0, 40))
    d_out = torch.randn(1, 2, 40, 16)
    got, want = backward(x, CUDA.forward(x), d_out), backward(clamped, CUDA.forward(clamped), d_out)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], want[:3], strict=True))


@pytest.mark.parametrize("name", ["causal", "lengths", "bias", "documents"])
def test_conservation_laws(name: str) -> None:
    x = situation(name, torch.float32, kind="normal").operands()
    d_out = torch.randn(*x.q.shape[:3], x.v.shape[3])
    assert_verdicts(laws.check("cuda", x, d_out, bias_grad=x.bias is not None), name)


@pytest.mark.parametrize("name", ["causal", "dropout", "weights_bias", "varlen_causal"])
def test_the_same_bits_every_time(name: str) -> None:
    case = situation(name, torch.bfloat16)
    x = case.operands()
    residuals = CUDA.forward(x)
    gradients = case.gradients(x)
    first, again = (CUDA.backward(x, residuals, *gradients, case.spec.bias_grad) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (b is not None and torch.equal(a, b))
