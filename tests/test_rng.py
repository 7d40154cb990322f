"""The dropout generator: Philox4x32 known answers, and bits that depend on logical coordinates alone."""

from __future__ import annotations

import math

import pytest
import torch

from attn import rng

PI = "243f6a88 85a308d3 13198a2e 03707344"
KNOWN_ANSWERS = [  # rounds, counter, key, words: the published test vectors of Random123 (kat_vectors, philox4x32)
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, PI, "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, PI, "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([int(w, 16)]) for w in text.split())


@pytest.mark.parametrize(("rounds", "counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(rounds: int, counter: str, key: str, answer: str) -> None:
    found = rng.philox(words(counter), words(key), rounds)  # type: ignore[arg-type]
    assert [f"{int(w):08x}" for w in found] == answer.split()


def philox_in_python(counter: list[int], key: list[int], rounds: int = 7) -> list[int]:
    """The paper's definition on Python integers, of any size and so without overflow."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        product0, product1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (product1 >> 32) ^ c[1] ^ k[0],
            product1 & 0xFFFFFFFF,
            (product0 >> 32) ^ c[3] ^ k[1],
            product0 & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize("seed", [0, -1, 1 << 62, -(1 << 63)])
@pytest.mark.parametrize("offset", [0, 5, -3, 1 << 40])
def test_each_bit_is_its_coordinates_word(seed: int, offset: int) -> None:
    B, H, L, S, p, first = 2, 3, 19, 37, 0.3, 4
    kept = rng.keep_mask(torch.tensor([seed, offset]), p, B, H, L, S, first)
    assert kept.shape == (B, H, L, S)
    assert kept.dtype == torch.bool
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 18, 36), (0, 1, 8, 7), (1, 0, 7, 8), (0, 2, 15, 16), (1, 1, 16, 31)]:
        counter = [i & ~8, j & ~8, (b + first) * H + h, offset & 0xFFFFFFFF]
        word = philox_in_python(counter, key)[2 * bool(i & 8) + bool(j & 8)]
        assert bool(kept[b, h, i, j]) == (word >= round(p * 2**32)), (b, h, i, j)


def test_bits_do_not_depend_on_the_sizes_around_them() -> None:
    state = torch.tensor([1234, 56])
    whole = rng.keep_mask(state, 0.5, 3, 2, 50, 70)
    assert torch.equal(rng.keep_mask(state, 0.5, 3, 2, 9, 70), whole[:, :, :9])
    assert torch.equal(rng.keep_mask(state, 0.5, 3, 2, 50, 33), whole[:, :, :, :33])
    assert torch.equal(rng.keep_mask(state, 0.5, 1, 2, 50, 70, first_batch=2), whole[2:])


def test_seed_offset_batch_and_head_each_change_the_pattern() -> None:
    masks = [
        rng.keep_mask(torch.tensor(state), 0.5, 1, 1, 32, 32, first)
        for state, first in (([1, 0], 0), ([2, 0], 0), ([1 + (1 << 32), 0], 0), ([1, 1], 0), ([1, 0], 1))
    ]
    for n, a in enumerate(masks):
        for b in masks[n + 1 :]:
            assert 0.35 < (a == b).double().mean() < 0.65


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    assert rng.keep_mask(torch.tensor([1, 2]), 0.5, *shape).shape == shape


def test_thresholds() -> None:
    assert rng.threshold(0.0) == 0
    assert rng.threshold(1.0) == 1 << 32
    assert rng.threshold(0.5) == 1 << 31
    assert rng.threshold(0.1) == 429496730


def test_nothing_dropped_at_0_everything_at_1() -> None:
    state = torch.tensor([7, 8])
    assert rng.keep_mask(state, 0.0, 1, 1, 16, 16).all()
    assert not rng.keep_mask(state, 1.0, 1, 1, 16, 16).any()


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_rate_and_independence(p: float) -> None:
    kept = rng.keep_mask(torch.tensor([42, 0]), p, 2, 4, 128, 256).double()
    n = kept.numel()
    assert abs(float(kept.mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    centred = (kept - (1 - p)) / math.sqrt(p * (1 - p))
    for shift, dim in ((1, 3), (8, 3), (1, 2), (8, 2), (1, 1), (1, 0)):  # neighbours, the four words, heads, batches
        correlation = float((centred * centred.roll(shift, dim)).mean())
        assert abs(correlation) < 5 / math.sqrt(n), (shift, dim)


def test_draw_follows_the_default_generator() -> None:
    torch.manual_seed(3)
    first, second = rng.draw(torch.device("cpu")), rng.draw(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(rng.draw(torch.device("cpu")), first)
    assert not torch.equal(first, second)
    assert first.dtype == torch.int64
    assert first.shape == (2,)
    with torch.random.fork_rng():
        inside = rng.draw(torch.device("cpu"))
    assert torch.equal(rng.draw(torch.device("cpu")), inside)


def test_a_word_equal_to_the_threshold_is_kept() -> None:
    word = philox_in_python([0, 0, 0, 3], [9, 0])[0]
    state = torch.tensor([9, 3])
    assert rng.threshold(word / 2**32) == word
    assert rng.keep_mask(state, word / 2**32, 1, 1, 1, 1).all()
    assert not rng.keep_mask(state, (word + 1) / 2**32, 1, 1, 1, 1).any()
