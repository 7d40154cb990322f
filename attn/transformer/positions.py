"""Positions that are added to the features of tokens: one-hot, learned, sinusoidal.

What enters inside attention instead is `attn.Rotary`, `Alibi` and `RelativeBias`; `scheme` makes any of them by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attn.operands import check_range
from attn.rotary import Rotary
from attn.transformer.config import LayerConfig, one_of, positive
from attn.transformer.position_bias import Alibi, RelativeBias

SCHEMES = ("none", "one-hot", "learned", "sinusoidal", "rotary", "alibi", "relative")


class _Table(nn.Module):
    """A row per position, added to the features of the token there."""

    table: Tensor

    def __init__(self, max_len: int, d_model: int) -> None:
        super().__init__()
        self.max_len, self.d_model = positive("max_len", max_len), positive("d_model", d_model)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Add the rows of `positions`.

        Args:
            x: (N, L, d_model).
            positions: integer (L,) or (N, L); None means 0 .. L - 1.

        Returns (N, L, d_model). Raises ValueError for a sequence longer than the table, and on CPU for positions
        outside of it.
        """
        L = x.shape[-2]
        if x.shape[-1] != self.d_model:
            raise ValueError(f"x has {x.shape[-1]} features; the position table has {self.d_model}")
        if self.max_len < L:
            raise ValueError(
                f"x: a sequence of {L} tokens is longer than the position table; give max_len >= {L} "
                f"(it is {self.max_len})"
            )
        if positions is None:
            return x + self.table[:L].to(x.dtype)
        check_range("positions", positions, 0, self.max_len - 1)
        return x + self.table[positions].to(x.dtype)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"max_len={self.max_len}, d_model={self.d_model}"


class OneHotPositions(_Table):
    """Feature p of the token at position p grows by 1: the simplest scheme.

    Raises ValueError for max_len > d_model: each position needs a feature of its own.
    """

    def __init__(self, max_len: int, d_model: int) -> None:
        super().__init__(max_len, d_model)
        if max_len > d_model:
            raise ValueError(f"max_len is {max_len}; one-hot positions need a feature each, and d_model is {d_model}")
        self.register_buffer("table", torch.eye(max_len, d_model), persistent=False)


class LearnedPositions(_Table):
    """A learned row per position (Gehring et al., 2017), drawn with standard deviation 0.02."""

    def __init__(self, max_len: int, d_model: int) -> None:
        super().__init__(max_len, d_model)
        self.table = nn.Parameter(0.02 * torch.randn(max_len, d_model))


class SinusoidalPositions(_Table):
    """Sines and cosines of periods from 2 pi to 2 pi * 10000 (Vaswani et al., 2017)."""

    def __init__(self, max_len: int, d_model: int) -> None:
        super().__init__(max_len, d_model)
        pairs = torch.arange(0, d_model, 2, dtype=torch.float64)
        angles = torch.arange(max_len, dtype=torch.float64)[:, None] * 10000.0 ** (-pairs / d_model)
        table = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :d_model]
        self.register_buffer("table", table.float(), persistent=False)


@dataclass(frozen=True)
class Scheme:
    """Where a position scheme enters a model: at most one of the three."""

    features: nn.Module | None = None
    rotary: Rotary | None = None
    bias: nn.Module | None = None


def scheme(name: str, config: LayerConfig, max_len: int) -> Scheme:
    """The position scheme of a model by name.

    Args:
        name: "none", "one-hot", "learned", "sinusoidal" (added to the features), "rotary" (turns queries and keys),
            "alibi" or "relative" (added to the scores).
        config: of the layers.
        max_len: the longest sequence that is ever seen, for the schemes with a table.

    Raises ValueError for an unknown name, one-hot positions with max_len > d_model, rotary ones with a head_dim < 2.
    """
    one_of("positions", name, SCHEMES)
    if name == "one-hot":
        return Scheme(features=OneHotPositions(max_len, config.d_model))
    if name == "learned":
        return Scheme(features=LearnedPositions(max_len, config.d_model))
    if name == "sinusoidal":
        return Scheme(features=SinusoidalPositions(max_len, config.d_model))
    if name == "rotary":
        return Scheme(rotary=config.rotary or Rotary(2 * math.floor(config.head_dim / 2)))
    if name == "alibi":
        return Scheme(bias=Alibi(config.nhead))
    if name == "relative":
        return Scheme(bias=RelativeBias(config.nhead, bidirectional=not config.causal))
    return Scheme()
