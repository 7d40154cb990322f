"""The CUDA decoding step: splits, packed rows, pages, lengths, what lies outside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attn
from attn import reference
from attn.backends import load
from attn.spec import DecodeOperands
from attn.testing import Case, assert_case, assert_close, assert_forward, cases, oracle
from attn.testing.matrix import DTYPES

CUDA = load("cuda")


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def step(
    dtype: torch.dtype, group: int, tokens: int, capacity: int, *lengths: int, D: int = 24, **more: object
) -> DecodeOperands:
    B = len(lengths)
    k, v = torch.randn(2, B, 2, capacity, D).to(dtype)
    q = torch.randn(B, 2 * group, tokens, D).to(dtype)
    return DecodeOperands(q, k, v, int32(*lengths), scale=D**-0.5)._replace(**more)  # type: ignore[arg-type]


def in_pages(x: DecodeOperands, slots: int) -> DecodeOperands:
    """The same step on a cache of shuffled pages, with NaN in those that no sequence uses."""
    B, H, capacity, _ = x.k_cache.shape
    pages = capacity // slots
    order = torch.randperm(B * pages + 3)[: B * pages].view(B, pages)

    def paged(t: Tensor) -> Tensor:
        parts = t.view(B, H, pages, slots, -1).transpose(1, 2).flatten(0, 1)
        made = t.new_full((B * pages + 3, *parts.shape[1:]), torch.nan)
        made[order.flatten()] = parts
        return made

    return x._replace(k_cache=paged(x.k_cache), v_cache=paged(x.v_cache), block_table=order.to(torch.int32))


def assert_step(x: DecodeOperands) -> tuple[Tensor, Tensor]:
    out, lse = CUDA.decode(x)
    assert_forward(oracle(x), out, lse)
    return out, lse


@pytest.mark.parametrize("case", cases(60, 31, ops=("decode",)), ids=str)
def test_random_step(case: Case) -> None:
    assert_case(case, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "tokens"), [(1, 1), (4, 4), (16, 1), (17, 1), (8, 8), (5, 13), (1, 70), (3, 40)])
def test_rows_of_a_group_and_new_tokens_share_tiles(group: int, tokens: int, dtype: torch.dtype) -> None:
    assert_step(step(dtype, group, tokens, 200, 200, 131, tokens, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 17, 33, 64, 96, 128, 200, 256])
@pytest.mark.parametrize("rows", [2, 30])
def test_head_dims(rows: int, D: int, dtype: torch.dtype) -> None:
    assert_step(step(dtype, 1, rows, 150, 150, 70, D=D))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000])
def test_lengths_at_the_boundaries_of_tiles_and_splits(length: int) -> None:
    """Alone, where a sequence is split finely, and among others, where it is not."""
    for dtype in (torch.bfloat16, torch.float32):
        assert_step(step(dtype, 2, 1, 1000, length))
        assert_step(step(dtype, 2, 3, 1000, *[length] * 20))


@pytest.mark.parametrize("slots", [1, 3, 16, 64, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_give_the_bits_of_a_contiguous_cache(slots: int, dtype: torch.dtype) -> None:
    x = step(dtype, 2, 2, slots * (400 // slots), 400 // slots * slots, 77, 0)
    for a, b in zip(CUDA.decode(in_pages(x, slots)), assert_step(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("left", [0, 1, 15, 63, 64, 65, 127, 300])
@pytest.mark.parametrize("right", [0, -1])
def test_windows(left: int, right: int) -> None:
    slopes = torch.rand(3, 4)
    for more in ({}, {"alibi_slopes": slopes, "softcap": 2.0}):
        assert_step(step(torch.bfloat16, 2, 3, 400, 400, 129, 2, left=left, right=right, **more))


def test_what_lies_past_the_lengths_reaches_nothing() -> None:
    x = step(torch.float32, 2, 2, 200, 130, 0, 64)
    want = CUDA.decode(x)
    for b, n in enumerate(x.lengths.tolist()):
        x.k_cache[b, :, n:] = torch.nan
        x.v_cache[b, :, n:] = torch.inf
    for a, b in zip(CUDA.decode(x), want, strict=True):
        assert torch.equal(a, b)


def test_the_keys_before_every_window_are_not_read() -> None:
    x = step(torch.bfloat16, 1, 1, 1000, 1000, left=10)
    x.v_cache[:, :, :900] = torch.nan  # 0 * NaN would show that a tile was read
    assert bool(CUDA.decode(x)[0].isfinite().all())


def test_tokens_without_a_key_are_dead() -> None:
    x = step(torch.float16, 2, 5, 64, 3, 0)
    out, lse = assert_step(x)
    for b, dead in ((0, 2), (1, 5)):
        assert bool((out[b, :, :dead] == 0).all())
        assert bool((lse[b, :, :dead] == -torch.inf).all())
        assert bool(lse[b, :, dead:].isfinite().all())


@pytest.mark.parametrize("shape", [(0, 2, 1), (2, 2, 0), (2, 0, 1)])
def test_empty(shape: tuple[int, int, int]) -> None:
    B, H, L = shape
    cache = torch.randn(B, min(H, 1), 9, 8)
    out, lse = CUDA.decode(DecodeOperands(torch.randn(B, H, L, 8), cache, cache, torch.full((B,), 9).int()))
    assert out.shape == (B, H, L, 8)
    assert lse.shape == (B, H, L)


@pytest.mark.parametrize("paged", [False, True])
def test_without_keys(paged: bool) -> None:
    cache = torch.randn(0, 1, 4, 8) if paged else torch.randn(2, 1, 0, 8)
    table = torch.zeros(2, 3, dtype=torch.int32) if paged else None
    out, lse = CUDA.decode(DecodeOperands(torch.randn(2, 2, 1, 8), cache, cache, int32(0, 0), table))
    assert bool((out == 0).all())
    assert bool((lse == -torch.inf).all())


@pytest.mark.parametrize("layout", ["heads last", "one head of many", "a slice of the head dim"])
def test_strides(layout: str) -> None:
    x = step(torch.bfloat16, 2, 2, 150, 150, 70)
    wide = {n: getattr(x, n) for n in ("q", "k_cache", "v_cache")}
    if layout == "heads last":
        moved = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in wide.items()}
    elif layout == "one head of many":
        moved = {n: t.repeat_interleave(3, 1)[:, ::3] for n, t in wide.items()}
    else:
        moved = {n: torch.cat([t[..., :1], t, t], -1)[..., 1:25] for n, t in wide.items()}
    for a, b in zip(CUDA.decode(x._replace(**moved)), assert_step(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lengths", [(1 << 30, -5), (-(1 << 31), (1 << 31) - 1)], ids=str)
def test_hostile_lengths_are_clamped(lengths: tuple[int, int]) -> None:
    x = step(torch.float32, 1, 2, 100, *lengths)
    good = x._replace(lengths=x.lengths.clamp(0, 100))
    for a, b in zip(CUDA.decode(x), CUDA.decode(good), strict=True):
        assert torch.equal(a, b)


def test_hostile_pages_are_clamped() -> None:
    x = in_pages(step(torch.float32, 1, 2, 100, 100, 55), 10)
    assert x.block_table is not None
    wild = x.block_table.clone()
    wild[0, 3], wild[1, 2], wild[0, 9] = -1, 1 << 30, -(1 << 31)
    got = CUDA.decode(x._replace(block_table=wild))
    want = CUDA.decode(x._replace(block_table=wild.clamp(0, x.k_cache.shape[0] - 1)))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_more_keys_than_the_kernels_count_are_refused() -> None:
    many = torch.randn(1, 1, 1, 16).expand(1, 1, (1 << 29) + 1, 16)
    with pytest.raises((ValueError, RuntimeError), match="count to 536870912"):
        CUDA.decode(DecodeOperands(many[:, :, :1], many, many, int32(5)))


def test_the_same_bits_every_time() -> None:
    x = step(torch.float16, 4, 3, 900, 900, 333)
    for a, b in zip(CUDA.decode(x), CUDA.decode(x), strict=True):
        assert torch.equal(a, b)


def test_the_call_that_users_write() -> None:
    x = step(torch.float32, 2, 1, 90, 90, 33)
    for a, b in zip(
        attn.decode_attention(x.q, x.k_cache, x.v_cache, lengths=x.lengths, return_lse=True, backend="cuda"),
        reference.decode(x._replace(scale=24**-0.5)),
        strict=True,
    ):
        assert_close(a, b)
