"""Positions that are added to the scores of self-attention: ALiBi and a learned bias per distance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attn.transformer.config import positive


class Alibi(nn.Module):
    """Minus a slope per head times the distance (Press et al., "Train short, test long", 2022).

    The slopes are a geometric row from 2 ** (-8 / nhead) on; where nhead is no power of two, the row of the power below
    is filled up with every second slope of the power above.

    Args:
        nhead: attention heads.
    """

    slopes: Tensor

    def __init__(self, nhead: int) -> None:
        super().__init__()
        full = 2 ** int(math.log2(positive("nhead", nhead)))
        between = _slopes(2 * full)[::2][: nhead - full]
        self.register_buffer("slopes", torch.tensor(_slopes(full) + between), persistent=False)

    def forward(self, queries: Tensor, keys: int) -> Tensor:
        """The bias (1 or N, nhead, L, keys) of queries at positions (L,) or (N, L), for keys at 0 .. keys - 1."""
        slopes = self.slopes.to(torch.promote_types(self.slopes.dtype, torch.float32))  # 16 bits hold few distances
        return -slopes[:, None, None] * _distances(queries, keys).abs()[:, None]

    def extra_repr(self) -> str:
        """The number of heads."""
        return f"nhead={len(self.slopes)}"


class RelativeBias(nn.Module):
    """A learned number per head and bucket of distances (Raffel et al., "T5", 2020).

    Half of the buckets hold one distance each, the others ever more, up to `max_distance`; the last one holds all that
    lie further. One object given to several layers shares its table among them, as T5 does.

    Args:
        nhead: attention heads.
        num_buckets: rows of the table, even and >= 4 (>= 2 where not bidirectional).
        max_distance: where the last bucket starts.
        bidirectional: keys after the query have buckets of their own; else they fall into that of distance 0.

    Raises ValueError for a number of buckets or a distance that does not fit.
    """

    def __init__(self, nhead: int, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True) -> None:
        super().__init__()
        positive("nhead", nhead)
        sides = 2 if bidirectional else 1
        if positive("num_buckets", num_buckets) % 2 or num_buckets < 2 * sides:
            raise ValueError(f"num_buckets is {num_buckets}; it must be even and >= {2 * sides}")
        self.per_side = num_buckets // sides
        if positive("max_distance", max_distance) <= self.per_side // 2:
            raise ValueError(f"max_distance is {max_distance}; it must be > {self.per_side // 2}")
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.table = nn.Embedding(num_buckets, nhead)

    def forward(self, queries: Tensor, keys: int) -> Tensor:
        """The bias (1 or N, nhead, L, keys) of queries at positions (L,) or (N, L), for keys at 0 .. keys - 1."""
        bias: Tensor = self.table(self.buckets(_distances(queries, keys)))
        return bias.movedim(-1, 1)

    def buckets(self, distances: Tensor) -> Tensor:
        """The bucket of each distance key - query, an integer tensor of any shape."""
        exact = self.per_side // 2
        far = distances.abs() if self.bidirectional else (-distances).clamp(min=0)
        growth = torch.log(far.clamp(min=1).double() / exact) / math.log(self.max_distance / exact)
        coarse = exact + (growth * (self.per_side - exact)).long()
        bucket = torch.where(far < exact, far, coarse.clamp(max=self.per_side - 1))
        return bucket + self.per_side * (distances > 0) if self.bidirectional else bucket

    def extra_repr(self) -> str:
        """The sizes."""
        return f"max_distance={self.max_distance}, bidirectional={self.bidirectional}"


def _slopes(heads: int) -> list[float]:
    return [2.0 ** (-8.0 * (n + 1) / heads) for n in range(heads)]


def _distances(queries: Tensor, keys: int) -> Tensor:
    """key - query as (1 or N, L, keys)."""
    distances = torch.arange(keys, device=queries.device) - queries[..., None]
    return distances if distances.dim() == 3 else distances[None]
