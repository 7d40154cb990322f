"""The CUDA forward and weights: dropout bits, dead rows, layouts, predicates at their boundaries, hostile values."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import Tensor

import attn
from attn import reference, rng
from attn.backends import load
from attn.spec import Operands
from attn.testing import assert_case, assert_close, assert_forward, assert_verdicts, judge_residuals, laws, oracle
from attn.testing.matrix import DTYPES, situation

CUDA = load("cuda")


def call(L: int = 40, S: int = 67, D: int = 16, H: int = 2, **more: object) -> Operands:
    q, k, v = torch.randn(1, H, L, D), torch.randn(1, H, S, D), torch.randn(1, H, S, D)
    return Operands(q, k, v, scale=D**-0.5)._replace(**more)  # type: ignore[arg-type]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999999])
def test_dropout_keeps_the_bits_of_the_reference(p: float, dtype: torch.dtype) -> None:
    """With q = 0 all probabilities are 1 / S, and what is not 0 was kept; v = the identity shows each one alone."""
    L, S = 70, 88
    seed = torch.tensor([-81985529216486896, 1 << 62], dtype=torch.int64)
    x = call(L, S, S, rng=seed, dropout_p=p, q=torch.zeros(1, 2, L, S))
    x = x._replace(v=torch.eye(S).expand(1, 2, S, S))
    x = x._replace(**{n: getattr(x, n).to(dtype) for n in ("q", "k", "v")})
    keep = rng.keep_mask(seed, p, 1, 2, L, S)
    out, m, l = CUDA.forward(x)
    assert torch.equal(out != 0, keep)
    assert torch.equal(CUDA.weights(x, m, l, False) != 0, keep)


def test_the_sequence_counts_in_the_bits_of_a_packed_call() -> None:
    cu, S = int32(0, 40, 72), 72
    x = call(S, S, S, rng=torch.tensor([5, 6]), dropout_p=0.5, q=torch.zeros(1, 2, S, S))
    x = x._replace(v=torch.eye(S).expand(1, 2, S, S), cu_seqlens_q=cu, cu_seqlens_k=cu)
    out = CUDA.forward(x)[0]
    for n, (first, last) in enumerate(((0, 40), (40, 72))):
        keep = rng.keep_mask(torch.tensor([5, 6]), 0.5, 1, 2, last - first, last - first, n)
        assert torch.equal(out[:, :, first:last, first:last] != 0, keep)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dead_rows_are_zero(dtype: torch.dtype) -> None:
    """Whatever the values hold."""
    keep = torch.rand(1, 2, 40, 67) < 0.5
    keep[:, :, 5] = False
    keep[:, 1, 33:] = False
    x = call(keep=keep)
    x = x._replace(**{n: getattr(x, n).to(dtype) for n in ("q", "k", "v")})
    dead = ~keep.any(-1)
    for v in (x.v, torch.full_like(x.v, torch.inf)):
        out, m, l = CUDA.forward(x._replace(v=v))
        assert bool((out[dead] == 0).all())
        assert bool((m[dead] == -torch.inf).all())
        assert bool((l[dead] == 0).all())
    assert bool((CUDA.weights(x, m, l, False)[dead] == 0).all())


def test_rows_past_the_query_lengths_are_dead_beside_a_key_of_nan() -> None:
    x = call(query_lengths=int32(9))
    x = x._replace(k=x.k.index_fill(2, torch.tensor([3]), torch.nan))
    out, m, l = CUDA.forward(x)
    assert bool((out[:, :, 9:] == 0).all())
    assert bool((l[:, :, 9:] == 0).all())
    assert bool(out[:, :, :9].isnan().all())
    assert bool((CUDA.weights(x, m, l, True)[:, 9:] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(1, 256), (2, 31), (32, 33), (40, 64), (65, 63), (100, 100), (128, 129), (200, 1)])
@pytest.mark.parametrize("name", ["causal", "everything"])
def test_head_dims(name: str, dims: tuple[int, int], dtype: torch.dtype) -> None:
    more = {"head_dim": dims[0], "value_dim": dims[1], "grad": False, "bias_grad": False}
    assert_case(situation(name, dtype, L=18, S=66, **more), "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 20, 18, 17])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "columns", "broadcast", "strided"])
def test_layouts_that_copies_of_each_width_serve(layout: str, head_dim: int, dtype: torch.dtype) -> None:
    case = situation("causal", dtype, head_dim=head_dim, value_dim=head_dim, grad=False)
    assert_case(dataclasses.replace(case, layout=layout), "cuda")


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_data_that_begins_anywhere(dtype: torch.dtype, offset: int) -> None:
    x = call(33, 50, 24)._replace(right=0)
    moved = []
    for t in x[:3]:
        room = torch.full((offset + t.numel() * 2,), torch.nan).to(dtype)  # type: ignore[union-attr]
        strides = (4000, 1600, 32, 1) if offset != 1 else (4000, 1601, 31, 1)
        moved.append(room.as_strided(t.shape, strides, offset).copy_(t))  # type: ignore[union-attr]
    x = x._replace(q=moved[0], k=moved[1], v=moved[2])
    got = CUDA.forward(x)
    want = CUDA.forward(x._replace(q=x.q.contiguous(), k=x.k.contiguous(), v=x.v.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_row_stride_that_overflows_32_bits() -> None:
    rows = torch.empty(1 << 30, dtype=torch.float16)  # never touched between the rows
    far = rows.as_strided((1, 1, 3, 16), (0, 0, 1 << 28, 1)).copy_(torch.randn(1, 1, 3, 16))
    near = far.contiguous()
    assert torch.equal(CUDA.forward(Operands(far, far, far))[0], CUDA.forward(Operands(near, near, near))[0])


def test_more_rows_than_the_kernels_count_are_refused() -> None:
    many, one = torch.randn(1, 1, 1, 16).expand(1, 1, (1 << 29) + 1, 16), torch.randn(1, 1, 1, 16)
    with pytest.raises((ValueError, RuntimeError), match="count to 536870912"):
        CUDA.forward(Operands(one, many, many))


SIDES = (15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129)
"""Around the rows of a warp and a tile, and the keys of the tiles of every kernel."""


@pytest.mark.parametrize("n", SIDES)
@pytest.mark.parametrize("name", ["full", "causal", "causal_end", "window", "prefix_window", "keep_causal", "dropout"])
def test_boundaries_of_tiles(name: str, n: int) -> None:
    dtype = DTYPES[n % 3]
    more = {"B": 1, "Hq": 1, "grouped": False, "grad": False}
    assert_case(situation(name, dtype, L=n, S=n + 1, **more), "cuda")
    assert_case(situation(name, dtype, L=n + 1, S=n, head_dim=65, **more), "cuda")


@pytest.mark.parametrize("left", [0, 47, 48, 49, 64, 96])
@pytest.mark.parametrize("right", [0, 1, 47, 48, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bands_whose_edge_meets_that_of_a_tile(left: int, right: int, dtype: torch.dtype) -> None:
    more = {"B": 1, "Hq": 1, "grouped": False, "grad": False}
    assert_case(situation("window", dtype, L=200, S=193, left=left, right=right, **more), "cuda")


@pytest.mark.parametrize("prefix", [1, 47, 48, 49, 64, 65, 100])
def test_prefixes_that_end_where_a_tile_does(prefix: int) -> None:
    for heavy in (False, True):
        x = call(130, 200, H=1, left=3, right=0, end=True, prefix=int32(prefix))
        if heavy:
            x = x._replace(softcap=3.0)
        out, m, l = CUDA.forward(x)
        exact = oracle(x)
        assert_verdicts(judge_residuals(exact, m, l))
        assert_forward(exact, out, reference.lse_of(m, l))


def test_a_kernel_skips_what_its_mask_hides() -> None:
    """A NaN in a value of a tile that no query of a block sees stays there: 0 * NaN would show that it was read."""
    x = call(96, 384, H=1)
    v = x.v.clone()
    v[:, :, 192:] = torch.nan
    first = torch.zeros(1, 96, dtype=torch.int64)
    for more in (
        {"right": 0},
        {"left": 0, "right": 0},
        {"key_lengths": int32(192)},
        {"ids_q": first, "ids_k": (torch.arange(384) >= 192).long()[None]},
        {"left": 4, "right": 0, "prefix": int32(20)},
    ):
        for softcap in (0.0, 3.0):
            assert bool(CUDA.forward(x._replace(v=v, softcap=softcap, **more))[0].isfinite().all())
    v = x.v.clone()
    v[:, :, 64:256] = torch.nan  # between the prefix and the window of the last rows
    gap = x._replace(v=v, q=x.q[:, :, 68:], left=4, right=0, end=True, prefix=int32(20))
    assert bool(CUDA.forward(gap)[0].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 50.0])
def test_maxima_that_grow_from_tile_to_tile(dtype: torch.dtype, softcap: float) -> None:
    """By less and by more than what a shift waits for; it stays within 8 ln 2 of the maximum."""
    for step in (0.02, 0.1, 0.5):
        x = call(20, 200, softcap=softcap)
        k = x.k * 0.1
        k[..., 0] += torch.arange(200) * step
        x = x._replace(q=(x.q * 0.1 + 1).to(dtype), k=k.to(dtype), v=x.v.to(dtype))
        out, m, l = CUDA.forward(x)
        exact = oracle(x)
        assert_verdicts(judge_residuals(exact, m, l))
        assert_forward(exact, out, reference.lse_of(m, l))


HOSTILE: dict[str, dict[str, object]] = {
    "lengths": {"key_lengths": int32(1 << 30), "query_lengths": int32(-5)},
    "long query_lengths": {"key_lengths": int32(-(1 << 31)), "query_lengths": int32((1 << 31) - 1)},
    "prefix": {"prefix": int32(1 << 30), "right": 0},
    "negative prefix": {"prefix": int32(-9), "right": 0, "end": True},
}


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values_are_clamped(name: str, softcap: float) -> None:
    x = call(softcap=softcap)._replace(**HOSTILE[name])  # type: ignore[arg-type]
    limits = {"key_lengths": 67, "query_lengths": 40, "prefix": 67}
    clamped = {n: getattr(x, n).clamp(0, most) for n, most in limits.items() if getattr(x, n) is not None}
    got, want = CUDA.forward(x), reference.forward(x._replace(**clamped))
    assert_close(got[0], want[0])
    assert_close(reference.lse_of(*got[1:]), reference.lse_of(*want[1:]))


@pytest.mark.parametrize("cu", [(0, 60, -7, 30), (50, 20, 1 << 30), (-(1 << 31), (1 << 31) - 1, 0)], ids=str)
def test_hostile_sequences_stay_inside_their_tensors(cu: tuple[int, ...]) -> None:
    """The emulator stops at the first access outside a tensor; rows of two sequences, or of none, are its to report."""
    x = call(cu_seqlens_q=int32(*cu), cu_seqlens_k=int32(*cu), right=0, end=True)
    said = "GlobalGap"
    try:
        CUDA.forward(x)
    except RuntimeError as error:
        said = str(error)
    assert re.search("GlobalRace|GlobalGap", said)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 48, 100, 256])
@pytest.mark.parametrize("average", [True, False])
def test_weights(average: bool, head_dim: int, dtype: torch.dtype) -> None:
    weights = "mean" if average else "heads"
    for S in (64, 33, 70, 68):  # rows of weights that stores of 16, 2, 4 and 8 bytes serve
        case = situation("causal_end", dtype, head_dim=head_dim, L=35, S=S, weights=weights, grad=False, B=2)
        assert_case(case, "cuda")


def test_weights_of_a_heads_mean_are_the_mean_of_the_heads() -> None:
    x = situation("dropout_causal", torch.float32, Hq=6, Hkv=2).operands()
    _, m, l = CUDA.forward(x)
    assert_close(CUDA.weights(x, m, l, True), CUDA.weights(x, m, l, False).mean(1))


@pytest.mark.parametrize("name", ["causal", "lengths", "bias", "dropout", "varlen_causal"])
def test_residuals_of_the_reference_give_the_same_weights(name: str) -> None:
    x = situation(name, torch.float32).operands()
    if x.cu_seqlens_q is not None:
        with pytest.raises(RuntimeError, match="no weights of packed calls"):
            CUDA.weights(x, *CUDA.forward(x)[1:], True)
        return
    assert_close(CUDA.weights(x, *reference.forward(x)[1:], False), reference.weights(x, *CUDA.forward(x)[1:], False))


def test_running_mean() -> None:
    x = call(70, 70, right=0)
    x = x._replace(q=torch.zeros_like(x.q))
    assert_verdicts([laws.running_mean(x, CUDA.forward(x)[0])])


def test_a_section_of_heads_is_all_of_them() -> None:
    """More heads than stay in the cache together: each tile of each head is still made once."""
    k = torch.randn(1, 1, 1, 64).expand(1, 3, 70000, 64)
    q = torch.randn(1, 3, 5, 64)
    x = Operands(q, k, k, left=0, right=0, end=True)
    assert_close(CUDA.forward(x)[0], k[:, :, :5])


def test_the_call_that_users_write() -> None:
    q, k, v = torch.randn(2, 3, 33, 24), torch.randn(2, 1, 50, 24), torch.randn(2, 1, 50, 16)
    mask = attn.masks.causal("end") & attn.masks.padding(int32(50, 21))
    got = attn.attention(q, k, v, mask=mask, return_lse=True, backend="cuda")
    want = attn.attention(q, k, v, mask=mask, return_lse=True, backend="reference")
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)
