"""Rotary position embedding: its definition, and that only distances count."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

import attn
from attn.testing import assert_close

B, H, L, D = 2, 3, 7, 8


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dim", [2, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_definition(interleaved: bool, dim: int, dtype: torch.dtype) -> None:
    """Each pair as one complex number, times exp(i * position * base ** (-2n / dim))."""
    x = torch.randn(B, H, L, D, dtype=torch.float64).to(dtype)
    got = attn.Rotary(dim, base=100.0, interleaved=interleaved)(x)
    expected = x.double().clone()
    for n in range(dim // 2):
        a, b = (2 * n, 2 * n + 1) if interleaved else (n, n + dim // 2)
        for p in range(L):
            angle = p * 100.0 ** (-2 * n / dim)
            cos, sin = math.cos(angle), math.sin(angle)
            expected[:, :, p, a] = x[:, :, p, a].double() * cos - x[:, :, p, b].double() * sin
            expected[:, :, p, b] = x[:, :, p, a].double() * sin + x[:, :, p, b].double() * cos
    assert got.dtype == dtype
    assert_close(got, expected, dtype=dtype)
    assert torch.equal(got[..., dim:], x[..., dim:])


@pytest.mark.parametrize("interleaved", [True, False])
def test_only_distances_count(interleaved: bool) -> None:
    turn = attn.Rotary(D, interleaved=interleaved)
    q, k = torch.randn(2, B, H, L, D, dtype=torch.float64)
    at = torch.arange(L)
    scores = turn(q, at) @ turn(k, at).transpose(-1, -2)
    for shift in (1, 3, 8):
        assert_close(turn(q, at + shift) @ turn(k, at + shift).transpose(-1, -2), scores)
    far = turn(q.float(), at + 100_000) @ turn(k.float(), at + 100_000).transpose(-1, -2)
    assert_close(far, scores)  # angles are float64, so that float32 loses nothing far away


def test_far_positions_in_float32() -> None:
    x, far = torch.randn(1, 1, 1, D), torch.tensor([1_000_000])
    assert_close(attn.Rotary(D)(x, far), attn.Rotary(D)(x.double(), far), dtype=torch.float32)


def test_positions_per_sequence() -> None:
    turn, x = attn.Rotary(4), torch.randn(B, H, L, D)
    at = torch.stack([torch.arange(L), torch.arange(L) + 3])
    got = turn(x, at)
    for n in range(B):
        assert torch.equal(got[n : n + 1], turn(x[n : n + 1], at[n]))
    assert torch.equal(turn(x), turn(x, torch.arange(L)))


def test_gradients_turn_back() -> None:
    turn, x = attn.Rotary(4), torch.randn(B, H, L, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(turn, (x[:1, :1, :3].detach().requires_grad_(),))
    turn(x).square().sum().backward()
    assert_close(x.grad, 2 * x)  # a rotation keeps lengths


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((3,), ValueError, "dim is 3"),
        ((0,), ValueError, "dim is 0"),
        ((4.0,), TypeError, "dim is 4.0"),
        ((True,), TypeError, "dim is True"),
        ((4, 0.0), ValueError, "base is 0.0"),
        ((4, float("nan")), ValueError, "base is nan"),
    ],
)
def test_bad_arguments(arguments: tuple[object, ...], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        attn.Rotary(*arguments)


def test_bad_calls() -> None:
    with pytest.raises(ValueError, match="8 features per head"):
        attn.Rotary(10)(torch.randn(B, H, L, D))
    with pytest.raises(ValueError, match="positions has shape"):
        attn.Rotary(4)(torch.randn(B, H, L, D), torch.arange(L + 1))


def test_is_a_value() -> None:
    turn = attn.Rotary(4, 500.0, True)
    assert pickle.loads(pickle.dumps(turn)) == turn
    assert turn != attn.Rotary(4)
    assert repr(turn) == "Rotary(dim=4, base=500.0, interleaved=True)"
