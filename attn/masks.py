"""Masks: a product of four parts, composed with `&`.

| part | data | visible when |
| --- | --- | --- |
| band | left, right, anchor, prefix | i + off - left <= j <= i + off + right, or j < prefix |
| lengths | key_lengths (B,), query_lengths (B,) | j < key_lengths[b] and i < query_lengths[b] |
| documents | ids_q (B, L), ids_k (B, S) | ids_q[b, i] == ids_k[b, j] |
| dense | bool or float tensor | True; a float is added to the scores and -inf hides |

`off` is 0 for anchor "start" (PyTorch's `is_causal`) and S - L for anchor "end", where L and S are the
sequence's own lengths when lengths are given. A new mask is one more constructor here; what it means on a
grid of positions stands in `visibility`, and what it lets a kernel skip in `tile_classes`: nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn.spec import UNBOUNDED, Operands

EMPTY, PARTIAL, FULL = 0, 1, 2
"""Classes of a tile: no pair visible, mask code needed, every pair visible."""


@dataclass(frozen=True)
class Band:
    """A diagonal band: `left` and `right` are >= 0 or None for unbounded, `anchor` is "start" or "end"."""

    left: int | None = None
    right: int | None = None
    anchor: str = "start"


@dataclass(frozen=True, eq=False)
class Mask:
    """A visibility over (B, Hq, L, S); made by the constructors of this module, composed with `&`."""

    band: Band | None = None
    prefix: Tensor | None = None
    key_lengths: Tensor | None = None
    query_lengths: Tensor | None = None
    ids_q: Tensor | None = None
    ids_k: Tensor | None = None
    dense: Tensor | None = None
    also: tuple[Mask, ...] = ()
    """Bands that merge with no other part; they become dense once the sizes are known."""

    def __and__(self, other: Mask) -> Mask:
        """Visible where both are. Float dense parts add."""
        if not isinstance(other, Mask):
            return NotImplemented
        band, prefix, also = _and_bands(self, other)
        ids_q, ids_k = _and_documents(self, other)
        return Mask(
            band=band,
            prefix=prefix,
            key_lengths=_minimum(self.key_lengths, other.key_lengths),
            query_lengths=_minimum(self.query_lengths, other.query_lengths),
            ids_q=ids_q,
            ids_k=ids_k,
            dense=_and_dense(self.dense, other.dense),
            also=self.also + other.also + also,
        )

    def show(self, L: int, S: int | None = None, b: int = 0, h: int = 0) -> str:
        """A picture of what L queries (rows) see of S keys (columns, L by default) in batch entry b and head h.

        >>> print(window(1, 0).show(4))
        ■ · · ·
        ■ ■ · ·
        · ■ ■ ·
        · · ■ ■
        """
        from attn.operands import checked  # which knows how a mask becomes operands, and knows this module

        S = L if S is None else S
        parts = (self.key_lengths, self.query_lengths, self.ids_q, self.prefix)
        sizes = [t.shape[0] for t in parts if t is not None]
        dense = (1, 1, 1, 1) if self.dense is None else (*(1,) * (4 - self.dense.dim()), *self.dense.shape)
        device = next((t.device for t in (*parts, self.dense) if t is not None), None)
        q, k = (torch.zeros(max([*sizes, dense[0]]), dense[1], n, 1, device=device) for n in (L, S))
        x = checked(q, k, k, self)
        seen = torch.ones(q.shape[0], q.shape[1], L, S, dtype=torch.bool, device=device)
        visible = visibility(x, L, S)
        if visible is not None:
            seen = seen & visible
        if x.bias is not None:
            seen = seen & (x.bias != -torch.inf)
        return "\n".join(" ".join("■" if here else "·" for here in row) for row in seen[b, h].tolist())

    def __repr__(self) -> str:
        words = [f"band({self.band.left}, {self.band.right}, {self.band.anchor!r})"] if self.band else []
        for name in ("prefix", "key_lengths", "query_lengths", "ids_q", "ids_k", "dense"):
            t = getattr(self, name)
            if t is not None:
                words.append(f"{name}{tuple(t.shape)}")
        return f"Mask({' & '.join([*words, *map(repr, self.also)])})"


def causal(anchor: str = "start") -> Mask:
    """Each query sees the keys up to its own position: j <= i + off."""
    return CAUSAL if anchor == "start" else window(None, 0, anchor)


CAUSAL = Mask(band=Band(None, 0, "start"))
"""The one object that `causal()` returns."""


def window(left: int | None, right: int | None, anchor: str = "start") -> Mask:
    """A sliding window: i + off - left <= j <= i + off + right; None leaves a side unbounded.

    Raises ValueError for a negative side or an unknown anchor, TypeError for a side that is no integer.
    """
    return Mask(band=_band(left, right, anchor))


def padding(lengths: Tensor, query_lengths: Tensor | None = None) -> Mask:
    """Only the first lengths[b] keys are visible; rows past query_lengths[b] are dead. Integer (B,)."""
    _integer("padding", "lengths", lengths, 1)
    if query_lengths is not None:
        _integer("padding", "query_lengths", query_lengths, 1)
        query_lengths = _int32(query_lengths)
    return Mask(key_lengths=_int32(lengths), query_lengths=query_lengths)


def documents(ids: Tensor | tuple[Tensor, Tensor]) -> Mask:
    """Only equal document ids see each other. Integer (B, L) where L = S, or a pair (B, L), (B, S)."""
    ids_q, ids_k = ids if isinstance(ids, tuple) else (ids, ids)
    _integer("documents", "ids", ids_q, 2)
    _integer("documents", "ids_k", ids_k, 2)
    return Mask(ids_q=ids_q.to(torch.int64), ids_k=ids_k.to(torch.int64))


def prefix_lm(n: int | Tensor, window: tuple[int | None, int | None] | None = None, anchor: str = "start") -> Mask:
    """Causal (or that window), or j < n: a prefix that everyone sees. `n`: int or integer (B,) tensor."""
    left, right = (None, 0) if window is None else window
    if isinstance(n, Tensor):
        _integer("prefix_lm", "n", n, 1)
        prefix = _int32(n)
    elif isinstance(n, int) and not isinstance(n, bool) and n >= 0:
        prefix = torch.full((1,), min(n, _MOST), dtype=torch.int32)
    else:
        raise ValueError(f"prefix_lm(): n is {n!r}; give an int >= 0 or an integer tensor of shape (B,)")
    return Mask(band=_band(left, right, anchor), prefix=prefix)


def dense(t: Tensor) -> Mask:
    """A tensor broadcastable to (B, Hq, L, S): bool (True = visible) or float (added; -inf hides)."""
    if not isinstance(t, Tensor):
        raise TypeError(f"dense(): t is {type(t).__name__}; give a bool or float tensor")
    if t.dtype != torch.bool and not t.is_floating_point():
        raise TypeError(f"dense(): t is {t.dtype}; give bool (True = attend) or float (added to the scores)")
    if t.dim() > 4:
        raise ValueError(f"dense(): t has {t.dim()} dims; it must broadcast to (B, Hq, L, S)")
    return Mask(dense=t)


def _band(left: int | None, right: int | None, anchor: str) -> Band:
    if anchor not in ("start", "end"):
        raise ValueError(f"window(): anchor is {anchor!r}; use 'start' (PyTorch's is_causal) or 'end'")
    return Band(_side("left", left), _side("right", right), anchor)


def _side(name: str, value: int | None) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"window(): {name} is {value!r}; give an int >= 0, or None for unbounded")
    if value < 0:
        raise ValueError(f"window(): {name} is {value}; give an int >= 0, or None for unbounded")
    if isinstance(value, int) and value > torch.iinfo(torch.int64).max // 2:
        raise ValueError(f"window(): {name} is {value}, beyond any length; give None for unbounded")
    return value


def _integer(where: str, name: str, t: Tensor, dims: int) -> None:
    shape = "(B,)" if dims == 1 else "(B, length)"
    if not isinstance(t, Tensor):
        raise TypeError(f"{where}(): {name} is {type(t).__name__}; give an integer tensor of shape {shape}")
    if t.is_floating_point() or t.dtype == torch.bool or t.is_complex():
        raise TypeError(f"{where}(): {name} is {t.dtype}; give an integer tensor of shape {shape}")
    if t.dim() != dims:
        raise ValueError(f"{where}(): {name} has shape {tuple(t.shape)}; it must be {shape}")


_MOST = 2**31 - 1


def _int32(t: Tensor) -> Tensor:
    """What does not fit becomes the nearest number that does: as far outside every length as before."""
    return t.clamp(-_MOST, _MOST).to(torch.int32) if t.dtype == torch.int64 else t.to(torch.int32)


def _minimum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    if a.shape != b.shape:
        raise ValueError(f"padding & padding: lengths of {tuple(a.shape)} and {tuple(b.shape)} do not match")
    return torch.minimum(a, b)


def _and_bands(a: Mask, b: Mask) -> tuple[Band | None, Tensor | None, tuple[Mask, ...]]:
    if a.band is None or b.band is None:
        return (b.band, b.prefix, ()) if a.band is None else (a.band, a.prefix, ())
    if a.band == b.band and a.prefix is not None and b.prefix is not None and a.prefix.shape == b.prefix.shape:
        return a.band, torch.minimum(a.prefix, b.prefix), ()
    if a.band.anchor == b.band.anchor and a.prefix is None and b.prefix is None:
        sides = [(a.band.left, b.band.left), (a.band.right, b.band.right)]
        left, right = (y if x is None else x if y is None else min(x, y) for x, y in sides)
        return Band(left, right, a.band.anchor), None, ()
    return a.band, a.prefix, (Mask(band=b.band, prefix=b.prefix),)


def _ranks(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, int]:
    """Ids renumbered to [0, n) jointly, without a synchronisation and with static shapes."""
    both = torch.cat([q, k], dim=1).flatten()
    ordered, order = both.sort()
    steps = torch.zeros_like(ordered)
    steps[1:] = ordered[1:] != ordered[:-1]
    ranks = torch.empty_like(both).scatter_(0, order, steps.cumsum(0)).view(q.shape[0], -1)
    return ranks[:, : q.shape[1]], ranks[:, q.shape[1] :], both.shape[0]


def _and_documents(a: Mask, b: Mask) -> tuple[Tensor | None, Tensor | None]:
    if a.ids_q is None or b.ids_q is None:
        return (b.ids_q, b.ids_k) if a.ids_q is None else (a.ids_q, a.ids_k)
    if a.ids_q.shape != b.ids_q.shape or a.ids_k.shape != b.ids_k.shape:  # type: ignore[union-attr]
        raise ValueError(
            f"documents & documents: ids of {tuple(a.ids_q.shape)} and {tuple(b.ids_q.shape)} do not match"
        )
    aq, ak, _ = _ranks(a.ids_q, a.ids_k)  # type: ignore[arg-type]
    bq, bk, n = _ranks(b.ids_q, b.ids_k)  # type: ignore[arg-type]
    return aq * n + bq, ak * n + bk


def _and_dense(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    if not all(n == m or 1 in (n, m) for n, m in zip(reversed(a.shape), reversed(b.shape), strict=False)):
        raise ValueError(f"dense & dense: shapes {tuple(a.shape)} and {tuple(b.shape)} do not broadcast")
    if a.dtype == torch.bool and b.dtype == torch.bool:
        return a & b
    if a.dtype == torch.bool:
        a, b = b, a
    return a.masked_fill(~b, -torch.inf) if b.dtype == torch.bool else a + b


def lengths_of(x: Operands, L: int, S: int) -> tuple[Tensor | int, Tensor | int]:
    """(queries, keys) of each sequence, as ints or as (B, 1, 1, 1), clamped into [0, L] and [0, S]."""
    lq = L if x.query_lengths is None else x.query_lengths.clamp(0, L).view(-1, 1, 1, 1)
    lk = S if x.key_lengths is None else x.key_lengths.clamp(0, S).view(-1, 1, 1, 1)
    return lq, lk


def past(lengths: Tensor, n: int) -> Tensor:
    """Which of n rows lie past the lengths (B,): bool (B, 1, n, 1), for tensors (B, H, n, D)."""
    return torch.arange(n, device=lengths.device).view(1, 1, n, 1) >= lengths.view(-1, 1, 1, 1)


def distances(x: Operands, L: int, S: int) -> Tensor:
    """|i + S - L - j| with each sequence's own lengths, (B or 1, 1, L, S): what ALiBi multiplies."""
    lq, lk = lengths_of(x, L, S)
    i = torch.arange(L, device=x.q.device).view(1, 1, L, 1)
    j = torch.arange(S, device=x.q.device).view(1, 1, 1, S)
    return (i + lk - lq - j).abs()


def visibility(x: Operands, L: int, S: int) -> Tensor | None:
    """What all parts leave visible: bool, broadcastable to (B, Hq, L, S), or None where nothing is hidden.

    A float bias is not looked at: its -inf reaches the softmax by itself.
    """
    if not x.hides:
        return None
    i = torch.arange(L, device=x.q.device).view(1, 1, L, 1)
    j = torch.arange(S, device=x.q.device).view(1, 1, 1, S)
    lq, lk = lengths_of(x, L, S)
    parts: list[Tensor] = []
    if x.has_band:
        off = lk - lq if x.end else 0
        near = torch.ones((), dtype=torch.bool, device=x.q.device)
        if x.left != UNBOUNDED:
            near = near & (j >= i + off - x.left)
        if x.right != UNBOUNDED:
            near = near & (j <= i + off + x.right)
        if x.prefix is not None:
            near = near | (j < x.prefix.view(-1, 1, 1, 1))
        parts.append(near)
    if x.key_lengths is not None:
        parts.append(j < lk)
    if x.query_lengths is not None:
        parts.append(i < lq)
    if x.ids_q is not None and x.ids_k is not None:
        parts.append(x.ids_q[:, None, :, None] == x.ids_k[:, None, None, :])
    if x.keep is not None:
        parts.append(x.keep)
    out = parts[0]
    for part in parts[1:]:
        out = out & part
    return out


def as_dense(x: Operands) -> Tensor | None:
    """All that hides or biases a score as one mask, bool or float, with -inf where something hides; None for nothing.

    It is never expanded over dimensions in which it is constant.
    """
    L, S = x.q.shape[2], x.k.shape[2]
    seen, bias = visibility(x, L, S), x.bias
    if x.alibi_slopes is not None:
        slopes = x.alibi_slopes.to(torch.promote_types(x.q.dtype, x.alibi_slopes.dtype))  # float64 calls stay exact
        slope = -distances(x, L, S) * slopes[:, :, None, None]
        bias = slope if bias is None else bias + slope
    if bias is None:
        return seen
    return bias if seen is None else bias.masked_fill(~seen, -torch.inf)


def tile_classes(x: Operands, block_q: int = 64, block_k: int = 64) -> Tensor:
    """EMPTY, PARTIAL or FULL for each tile: uint8 (B, Hq or 1, ceil(L / block_q), ceil(S / block_k)).

    What a kernel with such tiles may skip (EMPTY) and where it needs no mask code (FULL).
    """
    L, S = x.q.shape[2], x.k.shape[2]
    B, nq, nk = x.q.shape[0], -(-L // block_q), -(-S // block_k)
    seen = visibility(x, L, S)
    if seen is None:
        return torch.full((B, 1, nq, nk), FULL, dtype=torch.uint8, device=x.q.device)
    seen = seen.expand(B, -1, L, S)
    outside = (0, nk * block_k - S, 0, nq * block_q - L)

    def tiles(beyond: bool) -> Tensor:
        padded = torch.nn.functional.pad(seen, outside, value=beyond)
        return padded.view(B, seen.shape[1], nq, block_q, nk, block_k)

    some, every = tiles(False).any(5).any(3), tiles(True).all(5).all(3)
    return torch.where(some, torch.where(every, FULL, PARTIAL), EMPTY).to(torch.uint8)


# Masks may be arguments of exported programs and of functions under torch.func transforms.
torch.utils._pytree.register_pytree_node(
    Band,
    lambda band: ([], (band.left, band.right, band.anchor)),
    lambda _, context: Band(*context),
    serialized_type_name="attn.masks.Band",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=lambda band: ([], (band.left, band.right, band.anchor)),
)
torch.export.register_dataclass(Mask, serialized_type_name="attn.masks.Mask")
torch.serialization.add_safe_globals([Band, Mask])
