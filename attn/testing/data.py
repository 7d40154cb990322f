"""The numbers of a case: what kinds of data there are, and how tensors lie in memory."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from attn import masks, reference
from attn.spec import AttentionSpec, DecodeOperands, Operands

KINDS: dict[str, tuple[str, ...]] = {  # kind -> the spec fields of which it needs one
    "normal": (),
    "large": (),  # one key gets all of the weight in most rows
    "shifted": (),  # all scores of a head near +120 or -120
    "tiny": (),
    "dead": ("keep", "bias", "key_lengths", "query_lengths"),  # rows, or a whole sequence, without a visible key
    "finfo_min": ("bias",),  # rows of a float mask that are the most negative number throughout
    "past_nan": ("key_lengths", "query_lengths"),  # NaN and infinity behind the lengths
    "hidden_nan": ("band", "documents", "keep", "key_lengths"),  # NaN in keys that no query sees
    "visible_nan": (),  # NaN in one query
}
FORWARD_ONLY = ("hidden_nan", "visible_nan")
ORDINARY = ("normal", "dead", "finfo_min", "past_nan")
"""Kinds whose scores are of ordinary size, so that the root mean square error is too."""
PER_BATCH = ("past_nan", "hidden_nan")
"""Kinds whose NaN would be visible elsewhere if a sequence shared its memory with others."""
LAYOUTS = ("contiguous", "transposed", "sliced", "strided", "columns", "broadcast")
AnyOperands = TypeVar("AnyOperands", Operands, DecodeOperands)


def fits(kind: str, spec: AttentionSpec) -> bool:
    """Whether data of this kind means something for a call of this spec."""
    if spec.op == "decode":
        return kind in ("normal", "past_nan")
    if spec.op == "varlen" and kind == "hidden_nan":
        return False
    needs = KINDS[kind]
    return not needs or any(getattr(spec, name) for name in needs)


class Draw:
    """Random tensors from one seed, always drawn on the CPU."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32."""
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        """Float32 in [0, 1)."""
        return torch.rand(shape, generator=self.generator)

    def coin(self, *shape: int) -> Tensor:
        """Bool, mostly True."""
        return self.uniform(*shape) < 0.7

    def integers(self, n: int, low: int, high: int) -> Tensor:
        """Int32 (n,) in [low, high]."""
        return torch.randint(low, high + 1, (n,), generator=self.generator, dtype=torch.int32)

    def documents(self, B: int, n: int) -> Tensor:
        """Ascending ids (B, n): three documents or fewer."""
        return torch.randint(0, 3, (B, n), generator=self.generator).sort(1).values

    def permutation(self, n: int) -> Tensor:
        """Int64 (n,)."""
        return torch.randperm(n, generator=self.generator)

    def seed_pair(self) -> Tensor:
        """(seed, offset) of a dropout."""
        return torch.randint(-(1 << 63), (1 << 63) - 1, (2,), generator=self.generator)

    def cumulative(self, n: int, longest: int) -> Tensor:
        """cu_seqlens (n + 1,) of lengths in [0, longest]."""
        lengths = self.integers(n, 0, longest)
        return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)

    def broadcast(self, B: int, H: int, L: int, S: int, kind: str) -> tuple[int, int, int, int]:
        """A shape that broadcasts to (B, H, L, S); full in its last two dims where the kind writes rows."""
        keep = torch.rand(4, generator=self.generator) < 0.6
        if kind in ("dead", "finfo_min"):
            keep[2:] = True
        b, h, i, j = (n if k else 1 for n, k in zip((B, H, L, S), keep.tolist(), strict=True))
        return b, h, i, j


def shaped(x: Operands, kind: str, draw: Draw) -> Operands:
    """x with float32 data of that kind."""
    B, H, L, _ = x.q.shape
    if kind == "large":
        return x._replace(q=x.q * 12, k=x.k * 3)
    if kind == "tiny":
        return x._replace(q=x.q / 1024, k=x.k / 1024, v=x.v / 1024)
    if kind == "shifted":
        sign = torch.where(torch.arange(H) % 2 == 0, 1.0, -1.0).view(1, H, 1)
        q, k = x.q.clone(), x.k.clone()
        q[..., 0] = 4 * sign.expand(B, H, L)
        k[..., 0] = 30 / (x.scale or 1)
        return x._replace(q=q, k=k)
    if kind == "dead":
        return _dead(x, draw)
    if kind == "finfo_min" and x.bias is not None:
        low = torch.finfo(torch.float32).min
        rows = draw.uniform(*x.bias.shape[:3], 1) < 0.4
        some = draw.uniform(*x.bias.shape) < 0.3
        return x._replace(bias=x.bias.masked_fill(rows | some, low))
    if kind == "past_nan":
        return _past_nan(x)
    if kind == "hidden_nan":
        return _hidden_nan(x)
    if kind == "visible_nan" and x.q.numel():
        q = x.q.clone()
        q[-1, H // 2, L // 2, -1] = torch.nan
        return x._replace(q=q)
    return x


def _dead(x: Operands, draw: Draw) -> Operands:
    if x.keep is not None:
        x = x._replace(keep=x.keep & (draw.uniform(*x.keep.shape[:3], 1) < 0.6))
    if x.bias is not None:
        rows = draw.uniform(*x.bias.shape[:3], 1) < 0.4
        x = x._replace(bias=x.bias.masked_fill(rows, reference.NEG_INF))
    for name in ("key_lengths", "query_lengths"):
        lengths = getattr(x, name)
        if lengths is not None and lengths.numel():
            lengths = lengths.clone()
            lengths[-1] = 0
            x = x._replace(**{name: lengths})
    return x


def poison_past(t: Tensor, lengths: Tensor) -> Tensor:
    """t (B, H, n, D) with NaN past the lengths, and infinity in the first of its dims."""
    past = masks.past(lengths, t.shape[2])
    poison = torch.full_like(t, torch.nan)
    poison[..., 0] = torch.inf
    return torch.where(past.expand(t.shape), poison, t)


def _past_nan(x: Operands) -> Operands:
    L, S = x.q.shape[2], x.k.shape[2]
    queries, keys = x.query_lengths, x.key_lengths
    bias = None if x.bias is None else x.bias.expand(x.q.shape[0], -1, -1, -1)
    if queries is not None:
        x = x._replace(q=poison_past(x.q, queries))
        if bias is not None and bias.shape[2] == L:
            bias = bias.masked_fill(masks.past(queries, L), torch.nan)
    if keys is not None:
        x = x._replace(k=poison_past(x.k, keys), v=poison_past(x.v, keys))
        if bias is not None and bias.shape[3] == S:
            bias = bias.masked_fill(masks.past(keys, S).transpose(2, 3), torch.nan)
    return x._replace(bias=bias)


def _hidden_nan(x: Operands) -> Operands:
    """NaN in the keys that no query sees: never in values, where 0 * NaN may spread."""
    seen = masks.visibility(x, x.q.shape[2], x.k.shape[2])
    if seen is None:
        return x
    B, heads, S, _ = x.k.shape
    seen = seen.expand(B, x.q.shape[1], -1, S).any(2)
    unseen = ~seen.view(B, heads, -1, S).any(2)
    return x._replace(k=x.k.masked_fill(unseen[..., None], torch.nan))


def laid_out(t: Tensor, layout: str, which: int) -> Tensor:
    """t (B, H, n, D) with other strides; what lies between its elements is NaN. `which`: 0 q, 1 k, 2 v."""
    B, H, n, D = t.shape
    if layout == "transposed":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "sliced":
        return t.new_full((B, H, n + 1, D + 3), torch.nan)[:, :, 1:, 1 : D + 1].copy_(t)
    if layout == "strided":
        return t.new_full((B, H, n, D, 2), torch.nan)[..., 1].copy_(t)
    if layout == "broadcast" and which and t.numel():
        return t[:1, :1].expand(B, H, n, D)
    if layout == "broadcast" and t.numel():
        return t[:, :, :1].expand(B, H, n, D)
    return t


def placed(x: AnyOperands, layout: str, device: torch.device) -> AnyOperands:
    """x on the device, with q, k and v (or the caches) laid out."""
    moved: list[Any] = [t.to(device) if isinstance(t, Tensor) else t for t in x]
    for which in range(3):
        moved[which] = laid_out(moved[which], layout, which)
    return type(x)(*moved)
