"""Dropout bits: Philox4x32-7 on logical coordinates.

The bits of a score are a function of (seed, offset, batch, head, query, key) alone: the same in every
backend, tile size and pass, so that nothing is stored between forward and backward. Philox: Salmon, Moraes,
Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.

One call of the generator serves the four scores (i, j), (i, j + 8), (i + 8, j), (i + 8, j + 8): those that
one thread holds in a tensor-core accumulator and in its transpose. key = (low, high word of seed); counter =
(i & ~8, j & ~8, b * Hq + h, offset mod 2^32).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = ROUNDS
) -> list[Tensor]:
    """Philox4x32 of broadcastable int64 tensors that hold 32-bit words; returns four such tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(_M0, c0)
        high1, low1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return [c0, c1, c2, c3]


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) 32-bit words of a * b. By 16-bit halves of `a`: no intermediate leaves int64."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def threshold(dropout_p: float) -> int:
    """A score is kept where its word, unsigned, is >= this. 2^32 (drop all) at p = 1."""
    return round(dropout_p * 2**32)


def keep_mask(rng: Tensor, dropout_p: float, B: int, H: int, L: int, S: int, first_batch: int = 0) -> Tensor:
    """Which probabilities dropout keeps: bool (B, H, L, S). `rng` is int64 (2,): seed and offset.

    `first_batch` is the batch index of the first row of the result (a sequence number in packed calls).
    """
    device = rng.device
    seed, offset = rng[0], rng[1] & _LOW
    nq, nk = -(-L // 16), -(-S // 16)  # one counter per pair of rows (i, i + 8) and pair of keys (j, j + 8)
    i = torch.arange(nq * 8, device=device)
    j = torch.arange(nk * 8, device=device)
    i = (i // 8 * 16 + i % 8).view(1, -1, 1)
    j = (j // 8 * 16 + j % 8).view(1, 1, -1)
    bh = (torch.arange(B * H, device=device) + first_batch * H).view(-1, 1, 1)
    words = philox((i, j, bh & _LOW, offset), (seed & _LOW, (seed >> 32) & _LOW))
    grid = torch.stack(words, dim=-1) >= threshold(dropout_p)
    # The words' (2, 2), i + 8 and j + 8, go between i / 16 and i % 8, and between j / 16 and j % 8.
    grid = grid.view(B * H, nq, 8, nk, 8, 2, 2).permute(0, 1, 5, 2, 3, 6, 4)
    return grid.reshape(B, H, nq * 16, nk * 16)[:, :, :L, :S]


def draw(device: torch.device) -> Tensor:
    """(seed, offset) for one call, from torch's default generator of the device."""
    return torch.randint(-(1 << 63), (1 << 63) - 1, (2,), device=device)
