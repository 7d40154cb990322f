"""Masks against their meaning written in plain Python, exhaustively at small sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import attn
from attn import masks
from attn.masks import EMPTY, FULL, PARTIAL, Mask
from attn.operands import checked
from attn.spec import Operands
from attn.testing import assert_close

B, H, L, S = 2, 2, 5, 7
SIDES = (None, 0, 1, 3, 8)


def in_band(left: int | None, right: int | None, i: int, j: int, off: int) -> bool:
    return (left is None or j >= i + off - left) and (right is None or j <= i + off + right)


def operands(mask: Mask | None, B: int = B, H: int = H, L: int = L, S: int = S) -> Operands:
    q, k = torch.zeros(B, H, L, 1), torch.zeros(B, H, S, 1)
    return checked(q, k, k, mask=mask)


def visible(x: Operands) -> Tensor:
    """What a call sees, a float mask's -inf included: bool (B, H, L, S)."""
    rows, keys = x.q.shape[2], x.k.shape[2]
    full = x.q.shape[0], x.q.shape[1], rows, keys
    seen = masks.visibility(x, rows, keys)
    seen = torch.ones(full, dtype=torch.bool) if seen is None else seen.expand(full)
    return seen if x.bias is None else seen & (x.bias != -torch.inf)


@pytest.mark.parametrize("anchor", ["start", "end"])
@pytest.mark.parametrize("left", SIDES)
@pytest.mark.parametrize("right", SIDES)
def test_bands_at_all_lengths_up_to_9(left: int | None, right: int | None, anchor: str) -> None:
    for rows, keys in itertools.product(range(10), repeat=2):
        off = keys - rows if anchor == "end" else 0
        want = [[in_band(left, right, i, j, off) for j in range(keys)] for i in range(rows)]
        found = visible(operands(masks.window(left, right, anchor), 1, 1, rows, keys))[0, 0]
        assert found.tolist() == want, (rows, keys)


@pytest.mark.parametrize("anchor", ["start", "end"])
def test_causal_is_the_band_without_a_left_side(anchor: str) -> None:
    assert masks.causal(anchor).band == masks.window(None, 0, anchor).band


@pytest.mark.parametrize("anchor", ["start", "end"])
@pytest.mark.parametrize("window", [None, (1, 0), (0, 2), (2, None)])
def test_prefix_at_all_lengths_up_to_9(window: tuple[int | None, int | None] | None, anchor: str) -> None:
    left, right = (None, 0) if window is None else window
    for rows, keys in itertools.product(range(0, 10, 3), range(10)):
        for n in (0, 1, 4, 9):
            off = keys - rows if anchor == "end" else 0
            want = [[j < n or in_band(left, right, i, j, off) for j in range(keys)] for i in range(rows)]
            for given in (n, torch.tensor([n])):
                found = visible(operands(masks.prefix_lm(given, window, anchor), 1, 1, rows, keys))[0, 0]
                assert found.tolist() == want, (rows, keys, n)


@pytest.mark.parametrize("anchor", ["start", "end"])
@pytest.mark.parametrize(("left", "right"), [(None, 0), (1, 2), (0, 0), (2, None)])
def test_lengths_move_the_end_anchor(left: int | None, right: int | None, anchor: str) -> None:
    for rows, keys in itertools.product(range(6), range(8)):
        mask = masks.window(left, right, anchor) & masks.padding(torch.tensor([keys]), torch.tensor([rows]))
        off = keys - rows if anchor == "end" else 0
        want = [[i < rows and j < keys and in_band(left, right, i, j, off) for j in range(8)] for i in range(6)]
        assert visible(operands(mask, 1, 1, 6, 8))[0, 0].tolist() == want, (rows, keys)


@dataclass
class Part:
    """A mask beside its meaning: (b, h, i, j, rows, keys of that sequence) -> visible."""

    name: str
    mask: Mask
    sees: Callable[[int, int, int, int, int, int], bool]
    key_lengths: tuple[int, ...] = (S, S)
    query_lengths: tuple[int, ...] = (L, L)


def band_part(left: int | None, right: int | None, anchor: str, n: tuple[int, int] | None = None) -> Part:
    def sees(b: int, h: int, i: int, j: int, rows: int, keys: int) -> bool:
        off = keys - rows if anchor == "end" else 0
        return in_band(left, right, i, j, off) or (n is not None and j < n[b])

    mask = masks.window(left, right, anchor) if n is None else masks.prefix_lm(torch.tensor(n), (left, right), anchor)
    return Part(f"band({left}, {right}, {anchor}, {n})", mask, sees)


def padding_part(keys: tuple[int, int], rows: tuple[int, int] | None) -> Part:
    mask = masks.padding(torch.tensor(keys), None if rows is None else torch.tensor(rows))
    return Part(f"padding({keys}, {rows})", mask, lambda *_: True, keys, rows or (L, L))


def documents_part(seed: int) -> Part:
    ids_q, ids_k = torch.randint(0, 3, (B, L)), torch.randint(0, 3, (B, S))
    q, k = ids_q.tolist(), ids_k.tolist()
    return Part(f"documents {seed}", masks.documents((ids_q, ids_k)), lambda b, h, i, j, *_: q[b][i] == k[b][j])


def dense_part(shape: tuple[int, ...], floating: bool) -> Part:
    seen = torch.rand(shape) < 0.6
    full = seen.expand(B, H, L, S).tolist()
    t = torch.randn(shape).masked_fill(~seen, -torch.inf) if floating else seen
    return Part(f"dense {shape} {t.dtype}", masks.dense(t), lambda b, h, i, j, *_: full[b][h][i][j])


def parts() -> list[Part]:
    torch.manual_seed(5)
    return [
        band_part(None, 0, "start"),
        band_part(None, 0, "end"),
        band_part(2, 1, "start"),
        band_part(1, None, "end"),
        band_part(1, 0, "start", (3, 1)),
        band_part(1, 0, "start", (0, 4)),
        band_part(None, 0, "end", (2, 6)),
        Part("prefix 4", masks.prefix_lm(4, (1, 0)), lambda b, h, i, j, *_: j < 4 or in_band(1, 0, i, j, 0)),
        padding_part((4, 7), None),
        padding_part((0, 5), (3, 0)),
        documents_part(0),
        documents_part(1),
        dense_part((L, S), False),
        dense_part((B, 1, 1, S), False),
        dense_part((1, H, L, 1), True),
        dense_part((B, H, L, S), True),
    ]


def meaning(chosen: tuple[Part, ...]) -> list[object]:
    keys = [min(p.key_lengths[b] for p in chosen) for b in range(B)]
    rows = [min(p.query_lengths[b] for p in chosen) for b in range(B)]

    def seen(b: int, h: int, i: int, j: int) -> bool:
        return i < rows[b] and j < keys[b] and all(p.sees(b, h, i, j, rows[b], keys[b]) for p in chosen)

    return [[[[seen(b, h, i, j) for j in range(S)] for i in range(L)] for h in range(H)] for b in range(B)]


@pytest.mark.parametrize("n", range(len(parts())))
def test_and_in_all_pairs(n: int) -> None:
    every = parts()
    for other in every:
        pair = (every[n], other)
        found = visible(operands(pair[0].mask & pair[1].mask))
        assert found.tolist() == meaning(pair), f"{pair[0].name} & {pair[1].name}"


def test_and_of_three_in_any_order() -> None:
    every = parts()
    triples = list(itertools.combinations(every, 3))[::7]
    for a, b, c in triples:
        want = meaning((a, b, c))
        assert visible(operands((a.mask & b.mask) & c.mask)).tolist() == want, (a.name, b.name, c.name)
        assert visible(operands(c.mask & (b.mask & a.mask))).tolist() == want, (c.name, b.name, a.name)


def test_merges_stay_parts_where_that_is_exact() -> None:
    merged = masks.window(5, 0) & masks.window(2, None)
    assert merged.band == masks.Band(2, 0)
    assert not merged.also
    assert not (masks.padding(torch.tensor([3, 4])) & masks.padding(torch.tensor([5, 2]))).also
    assert (masks.causal() & masks.causal("end")).also


def test_float_masks_add() -> None:
    a, b = torch.randn(L, S), torch.randn(B, 1, L, 1)
    x = operands(masks.dense(a) & masks.dense(b))
    assert torch.equal(x.bias, a + b)  # type: ignore[arg-type]
    assert x.keep is None


def test_float_dense_and_bias_add_in_float32() -> None:
    q = torch.zeros(B, H, L, 1)
    k = torch.zeros(B, H, S, 1)
    a, b = torch.randn(L, S, dtype=torch.bfloat16), torch.randn(L, S)
    x = checked(q, k, k, mask=masks.dense(a), bias=b)
    assert torch.equal(x.bias[0, 0], a.float() + b)  # type: ignore[index]


def test_documents_of_one_tensor() -> None:
    ids = torch.tensor([[3, 3, -1, 7]])
    found = visible(operands(masks.documents(ids), 1, 1, 4, 4))[0, 0]
    assert torch.equal(found, ids[0][:, None] == ids[0][None])


@pytest.mark.parametrize("blocks", [(1, 1), (2, 3), (3, 2), (4, 4), (16, 8)])
def test_tile_classes_against_counting(blocks: tuple[int, int]) -> None:
    block_q, block_k = blocks
    for part in parts():
        x = operands(part.mask)
        seen = masks.visibility(x, L, S)
        full = torch.ones(B, 1, L, S, dtype=torch.bool) if seen is None else seen.expand(B, -1, L, S)
        classes = masks.tile_classes(x, block_q, block_k)
        assert classes.shape == (B, full.shape[1], -(-L // block_q), -(-S // block_k))
        for b, h, bq, bk in itertools.product(*map(range, classes.shape)):
            tile = full[b, h, bq * block_q : (bq + 1) * block_q, bk * block_k : (bk + 1) * block_k]
            want = EMPTY if not tile.any() else FULL if tile.all() else PARTIAL
            assert int(classes[b, h, bq, bk]) == want, (part.name, b, h, bq, bk)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
def test_tile_classes_of_nothing(sizes: tuple[int, int]) -> None:
    assert masks.tile_classes(operands(masks.causal(), 1, 1, *sizes), 2, 2).numel() == 0


def test_most_tiles_of_a_long_causal_call_need_no_mask_code() -> None:
    classes = masks.tile_classes(operands(masks.causal(), 1, 1, 512, 512), 64, 64)
    assert int((classes == PARTIAL).sum()) == 8
    assert int((classes == EMPTY).sum()) == 28


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: masks.padding(torch.tensor([1])) & masks.padding(torch.tensor([1, 2])), ValueError, "do not match"),
        (lambda: masks.dense(torch.zeros(2, 3)) & masks.dense(torch.zeros(2, 4)), ValueError, "do not broadcast"),
        (lambda: masks.window(-1, 0), ValueError, "left is -1"),
        (lambda: masks.window(2**70, 0), ValueError, "left is .*, beyond any length; give None"),
        (lambda: masks.window(0, -2), ValueError, "right is -2"),
        (lambda: masks.window(1.5, 0), TypeError, "left is 1.5"),
        (lambda: masks.window(True, 0), TypeError, "left is True"),
        (lambda: masks.causal("middle"), ValueError, "anchor is 'middle'"),
        (lambda: masks.prefix_lm(2, anchor="middle"), ValueError, "anchor is 'middle'"),
        (lambda: masks.prefix_lm(-2), ValueError, "n is -2"),
        (lambda: masks.prefix_lm(torch.tensor(2)), ValueError, "shape"),
        (lambda: masks.prefix_lm(torch.tensor([2.0])), TypeError, "float32"),
        (lambda: masks.padding([3, 4]), TypeError, "lengths is list"),
        (lambda: masks.padding(torch.tensor([3.0])), TypeError, "lengths is torch.float32"),
        (lambda: masks.padding(torch.tensor([[3]])), ValueError, "lengths has shape"),
        (lambda: masks.padding(torch.tensor([3]), torch.tensor([True])), TypeError, "query_lengths is torch.bool"),
        (lambda: masks.documents(torch.tensor([1, 2])), ValueError, "ids has shape"),
        (lambda: masks.documents((torch.zeros(1, 2), torch.zeros(1, 3))), TypeError, "ids is torch.float32"),
        (lambda: masks.dense([[True]]), TypeError, "t is list"),
        (lambda: masks.dense(torch.zeros(2, 2, dtype=torch.int64)), TypeError, "torch.int64"),
        (lambda: masks.dense(torch.zeros(1, 1, 1, 1, 1)), ValueError, "5 dims"),
        (lambda: masks.causal() & torch.ones(2, 2), TypeError, "&"),
        (
            lambda: (
                masks.documents(torch.zeros(1, 3, dtype=torch.int64))
                & masks.documents(torch.zeros(1, 4, dtype=torch.int64))
            ),
            ValueError,
            "do not match",
        ),
    ],
)
def test_bad_input(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_repr_names_the_parts() -> None:
    mask = masks.causal() & masks.padding(torch.tensor([1, 2])) & masks.causal("end")
    assert repr(mask) == "Mask(band(None, 0, 'start') & key_lengths(2,) & Mask(band(None, 0, 'end')))"


@pytest.mark.parametrize("length", [2**32 + 3, -(2**32) + 3, 2**62])
def test_lengths_beyond_32_bits_are_not_taken_for_others(length: int) -> None:
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match=r"lengths\[0\]"):
        attn.attention(q, q, q, mask=masks.padding(torch.tensor([length])))


def test_a_prefix_beyond_32_bits_is_seen_by_everyone() -> None:
    q = torch.randn(1, 2, 5, 4)
    everyone = attn.attention(q, q, q)
    for n in (2**40, torch.tensor([2**40])):
        assert_close(attn.attention(q, q, q, mask=masks.prefix_lm(n)), everyone)


@pytest.mark.parametrize(
    ("mask", "b", "h", "drawn"),
    [
        (masks.window(None, None), 0, 0, "■ ■ ■/■ ■ ■"),
        (masks.causal(), 0, 0, "■ · ·/■ ■ ·"),
        (masks.causal("end"), 0, 0, "■ ■ ·/■ ■ ■"),
        (masks.padding(torch.tensor([1, 2])), 1, 0, "■ ■ ·/■ ■ ·"),
        (masks.padding(torch.tensor([3]), torch.tensor([1])), 0, 0, "■ ■ ■/· · ·"),
        (masks.documents((torch.tensor([[0, 1]]), torch.tensor([[1, 0, 1]]))), 0, 0, "· ■ ·/■ · ■"),
        (masks.prefix_lm(torch.tensor([0, 2])), 1, 0, "■ ■ ·/■ ■ ·"),
        (masks.dense(torch.tensor([[0.0, -torch.inf, -1.0]])), 0, 0, "■ · ■/■ · ■"),
        (masks.dense(torch.eye(3)[:, None, None, :].bool()), 2, 0, "· · ■/· · ■"),
        (masks.dense(torch.eye(3)[:, None, :].bool()), 0, 1, "· ■ ·/· ■ ·"),
    ],
)
def test_show(mask: masks.Mask, b: int, h: int, drawn: str) -> None:
    assert mask.show(2, 3, b, h) == drawn.replace("/", "\n")


def test_show_takes_as_many_keys_as_queries() -> None:
    assert masks.causal().show(2) == "■ ·\n■ ■"
