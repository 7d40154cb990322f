"""Attention as plain torch: the definition that every kernel is held against.

For query i and key j of one head:

1. s = scale * q_i . k_j                         (float32; float64 for float64 inputs)
2. s = softcap * tanh(s / softcap)               if softcap > 0
3. s = s - slope * |i + S - L - j| + bias_ij     ALiBi, bias
4. s = -inf where the mask hides                 after scale, softcap and bias
5. m_i = max_j s_ij, l_i = sum_j exp(s_ij - m_i), w_ij = exp(s_ij - m_i) / l_i, lse_i = m_i + log l_i
6. w_ij = w_ij / (1 - p) where dropout keeps, else 0
7. out_i = sum_j w_ij v_j

A row without a visible key is dead: out 0, weights 0, m and lse -inf, l 0, gradient 0. What lies past
`key_lengths` or `query_lengths` is never read, NaN included. A NaN in a visible score stays in its row. In a
packed call all of this holds for each sequence alone, with positions inside the sequence and its number as
the batch index of the dropout.

`attend` is differentiable to any order and in forward mode; `forward`, `weights` and `backward` are the
passes that kernels implement, on the same residuals m and l. An active autocast changes none of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from attn import masks, rng
from attn.spec import DecodeOperands, Operands

NEG_INF = -torch.inf
P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(run: Callable[P, R]) -> Callable[P, R]:
    """Turn autocast off inside `run(x, ...)`: it would round the products to 16 bits."""

    @functools.wraps(run)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        kind = args[0].q.device.type  # type: ignore[attr-defined]
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return run(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return run(*args, **kwargs)

    return inside


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lse_of(m: Tensor, l: Tensor) -> Tensor:
    """The log-sum-exp of each row, natural log; -inf for a dead row."""
    return torch.where(l == 0, NEG_INF, m + torch.log(torch.where(l == 0, 1.0, l)))


@without_autocast
def attend(x: Operands, weights: str = "") -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, lse, weights or None), differentiable; `weights` is "", "mean" (over heads) or "heads"."""
    if x.cu_seqlens_q is not None:
        out, m, l = _each_sequence(x)
        return out, lse_of(m, l), None
    kept, m, l, seen = probabilities(x)
    w = _shown(x, kept, seen, weights == "mean") if weights else None
    return times_values(x, kept, l), lse_of(m, l), w


@without_autocast
def infer(x: Operands, weights: str = "") -> tuple[Tensor, Tensor | None]:
    """(out, weights or None) alone. In plain calls, where no row can be dead, few fused operations serve."""
    if not weights or x.bias is not None or x.alibi_slopes is not None or x.softcap or x.rng is not None or x.hides:
        out, _, w = attend(x, weights)
        return out, w
    q, k, v = x.q, x.k, x.v
    dtype = q.dtype
    if dtype.itemsize == 2:
        q, k, v = q.float(), k.float(), v.float()
    p = torch.softmax((q @ per_query_head(x, k).transpose(-1, -2)).mul_(x.scale), -1)
    out = p @ per_query_head(x, v)
    p = p.mean(1) if weights == "mean" else p
    return (out, p) if dtype.itemsize > 2 else (out.to(dtype), p.to(dtype))


@without_autocast
def forward(x: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """(out, m, l)."""
    return _each_sequence(x) if x.cu_seqlens_q is not None else forward_sequence(x)


@without_autocast
def forward_weights(x: Operands, average: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, m, l, weights): one pass over the scores for both."""
    kept, m, l, seen = probabilities(x)
    return times_values(x, kept, l), m, l, _shown(x, kept, seen, average)


@without_autocast
def weights(x: Operands, m: Tensor, l: Tensor, average: bool) -> Tensor:
    """Probabilities after dropout from the residuals: (B, L, S) averaged over heads, or (B, Hq, L, S)."""
    s, _, seen = scores(x)
    return _shown(x, dropped(x, normalised(s, m, l)), seen, average)


@without_autocast
def backward(
    x: Operands,
    residuals: tuple[Tensor, Tensor, Tensor],
    d_out: Tensor,
    d_lse: Tensor | None = None,
    d_weights: Tensor | None = None,
    needs_bias_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, d_bias) from what forward left.

    With P the probabilities, W = drop(P) the weights and dW = d_out Vᵀ + d_weights:
    dP = drop(dW), delta = rowsum(P dP) - d_lse, dS = P (dP - delta).
    """
    if x.cu_seqlens_q is not None:
        return _backward_each_sequence(x, residuals, d_out, d_lse)
    return backward_sequence(x, residuals, d_out, d_lse, d_weights, needs_bias_grad)


@without_autocast
def decode(x: DecodeOperands) -> tuple[Tensor, Tensor]:
    """(out, lse) of Lq new queries per sequence against a contiguous or paged cache; end-anchored."""
    out, m, l = forward_sequence(as_attention(x))
    return out, lse_of(m, l)


def as_attention(x: DecodeOperands) -> Operands:
    """A decoding step as an ordinary call: pages gathered, the cache's length in `key_lengths`, end-anchored."""
    k, v = (_gather_pages(cache, x.block_table) for cache in (x.k_cache, x.v_cache))
    whole = Operands(x.q, k, v, alibi_slopes=x.alibi_slopes, key_lengths=x.lengths, end=True)
    return whole._replace(left=x.left, right=x.right, scale=x.scale, softcap=x.softcap)


def scores(x: Operands) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(scores (B, Hq, L, S), -inf where hidden; derivative of the softcap or None; visibility or None)."""
    q, k, _ = within_lengths(x)
    L, S = q.shape[2], k.shape[2]
    s = q @ per_query_head(x, k).transpose(-1, -2) * x.scale
    d_cap = None
    if x.softcap > 0:
        t = torch.tanh(s / x.softcap)
        s, d_cap = x.softcap * t, 1 - t * t
    if x.alibi_slopes is not None:
        s = s - x.alibi_slopes.to(s.dtype)[:, :, None, None] * masks.distances(x, L, S)
    if x.bias is not None:
        s = s + x.bias.to(s.dtype)
    seen = masks.visibility(x, L, S)
    if seen is not None:
        s = s.masked_fill(~seen, NEG_INF)
    return s, d_cap, seen


def forward_sequence(x: Operands, sequence: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` of a padded call, or of one sequence of a packed call, whose number the dropout needs."""
    kept, m, l, _ = probabilities(x, sequence)
    return times_values(x, kept, l), m, l


def backward_sequence(
    x: Operands,
    residuals: tuple[Tensor, Tensor, Tensor],
    d_out: Tensor,
    d_lse: Tensor | None,
    d_weights: Tensor | None,
    needs_bias_grad: bool,
    sequence: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`backward` of a padded call, or of one sequence of a packed call."""
    _, m, l = residuals
    q, k, v = within_lengths(x)
    s, d_cap, seen = scores(x)
    p = normalised(s, m, l)
    dead = (l == 0)[..., None]
    g = d_out.to(s.dtype).masked_fill(dead, 0.0)
    dw = g @ per_query_head(x, v).transpose(-1, -2)
    if d_weights is not None:
        share = d_weights.to(s.dtype) if d_weights.dim() == 4 else d_weights.to(s.dtype)[:, None] / q.shape[1]
        share = share if seen is None else torch.where(seen, share, 0.0)
        dw = dw + share.masked_fill(dead, 0.0)
    dp = dropped(x, dw, sequence)
    delta = (p * dp).sum(-1)
    if d_lse is not None:
        delta = delta - d_lse.to(s.dtype).masked_fill(l == 0, 0.0)
    ds = p * (dp - delta[..., None])
    d_bias = None
    if needs_bias_grad and x.bias is not None:
        d_bias = ds.sum_to_size(x.bias.shape).to(x.bias.dtype)
    if d_cap is not None:
        ds = ds * d_cap
    dq = ds @ per_query_head(x, k) * x.scale
    dk = per_key_head(x, ds.transpose(-1, -2) @ q) * x.scale
    dv = per_key_head(x, dropped(x, p, sequence).transpose(-1, -2) @ g)
    return dq.to(x.q.dtype), dk.to(x.k.dtype), dv.to(x.v.dtype), d_bias


def probabilities(x: Operands, sequence: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(probabilities after dropout, m, l, visibility or None)."""
    s, _, seen = scores(x)
    m = s.detach().amax(-1) if s.shape[-1] else s.new_full(s.shape[:-1], NEG_INF)
    l = torch.exp(s - _finite(m)[..., None]).sum(-1)
    return dropped(x, normalised(s, m, l), sequence), m, l, seen


def normalised(s: Tensor, m: Tensor, l: Tensor) -> Tensor:
    """exp(s - m) / l, and 0 in dead rows, whose gradient is 0 too."""
    dead = (l == 0)[..., None]
    p = torch.exp(s - _finite(m)[..., None]) / l[..., None].masked_fill(dead, 1.0)
    return p.masked_fill(dead, 0.0)


def _finite(m: Tensor) -> Tensor:
    """m, with 0 for dead rows: exp(-inf - 0) is the 0 wanted there, exp(-inf + inf) would be NaN."""
    return m.masked_fill(m == NEG_INF, 0.0)


def dropped(x: Operands, p: Tensor, sequence: int = 0) -> Tensor:
    """p with 0 where dropout drops, else divided by what is kept; `sequence` is the number in a packed call."""
    if x.rng is None:
        return p
    if x.dropout_p >= 1:
        return torch.zeros_like(p)
    B, H, L, S = p.shape
    kept = rng.keep_mask(x.rng, x.dropout_p, B, H, L, S, sequence)
    return torch.where(kept, p / (1 - x.dropout_p), 0.0)


def times_values(x: Operands, kept: Tensor, l: Tensor) -> Tensor:
    """out (B, Hq, L, Dv), in memory (B, L, Hq, Dv) like every backend's; dead rows 0 whatever v holds."""
    out = kept @ per_query_head(x, within_lengths(x)[2])
    out = out.masked_fill((l == 0)[..., None], 0.0).to(x.q.dtype)
    return rows(out)


def rows(t: Tensor) -> Tensor:
    """t (B, H, L, D) laid out in memory as (B, L, H, D)."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _shown(x: Operands, kept: Tensor, seen: Tensor | None, average: bool) -> Tensor:
    """The weights as returned; hidden ones pass no gradient on, NaN included."""
    w = kept if seen is None else kept.masked_fill(~seen, 0.0)
    return (w.mean(1) if average else w).to(x.q.dtype)


def within_lengths(x: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in the accumulation dtype, zeroed past the lengths so that nothing behind them can spread."""
    acc = accumulate_dtype(x.q.dtype)
    q, k, v = x.q.to(acc), x.k.to(acc), x.v.to(acc)
    if x.key_lengths is not None:
        k, v = _zero_past(k, x.key_lengths), _zero_past(v, x.key_lengths)
    if x.query_lengths is not None:
        q = _zero_past(q, x.query_lengths)
    return q, k, v


def _zero_past(t: Tensor, lengths: Tensor) -> Tensor:
    return t.masked_fill(masks.past(lengths, t.shape[2]), 0.0)


def per_query_head(x: Operands, t: Tensor) -> Tensor:
    """(B, Hkv, ...) repeated to (B, Hq, ...)."""
    heads, kv_heads = x.q.shape[1], t.shape[1]
    return t if heads == kv_heads else t.repeat_interleave(heads // kv_heads, 1)


def per_key_head(x: Operands, t: Tensor) -> Tensor:
    """(B, Hq, ...) summed over each group to (B, Hkv, ...)."""
    heads, kv_heads = x.q.shape[1], x.k.shape[1]
    return t if heads == kv_heads else torch.unflatten(t, 1, (kv_heads, heads // kv_heads)).sum(2)


def _gather_pages(cache: Tensor, table: Tensor | None) -> Tensor:
    """(blocks, Hkv, block_size, D) pages to (B, Hkv, n * block_size, D)."""
    if table is None:
        return cache
    pages = cache[table.clamp(0, cache.shape[0] - 1).long()]  # (B, n, Hkv, block_size, D)
    return pages.transpose(1, 2).flatten(2, 3)


def sequences(x: Operands) -> Iterator[tuple[int, slice, slice, Operands]]:
    """The sequences of a packed call: (number, its tokens in q, in k, the sequence as its own call)."""
    ends_q, ends_k = x.cu_seqlens_q.tolist(), x.cu_seqlens_k.tolist()  # type: ignore[union-attr]
    for n in range(len(ends_q) - 1):
        at_q, at_k = slice(ends_q[n], ends_q[n + 1]), slice(ends_k[n], ends_k[n + 1])
        slopes = None if x.alibi_slopes is None else x.alibi_slopes[n : n + 1]
        prefix = None if x.prefix is None else x.prefix.expand(len(ends_q) - 1)[n : n + 1]
        part = Operands(x.q[:, :, at_q], x.k[:, :, at_k], x.v[:, :, at_k], *x[3:])
        part = part._replace(alibi_slopes=slopes, prefix=prefix, cu_seqlens_q=None, cu_seqlens_k=None)
        yield n, at_q, at_k, part


def _each_sequence(x: Operands) -> tuple[Tensor, Tensor, Tensor]:
    parts = [forward_sequence(part, n) for n, _, _, part in sequences(x)]
    rest = x.q.shape[2] - sum(out.shape[2] for out, _, _ in parts)  # rows of no sequence are dead
    B, H, Dv, acc = x.q.shape[0], x.q.shape[1], x.v.shape[3], accumulate_dtype(x.q.dtype)
    dead = x.q.new_full((B, H, rest), NEG_INF, dtype=acc)
    parts.append((x.q.new_zeros(B, rest, H, Dv).transpose(1, 2), dead, torch.zeros_like(dead)))
    out, m, l = zip(*parts, strict=True)
    return torch.cat([o.transpose(1, 2) for o in out], 1).transpose(1, 2), torch.cat(m, 2), torch.cat(l, 2)


def _backward_each_sequence(
    x: Operands, residuals: tuple[Tensor, Tensor, Tensor], d_out: Tensor, d_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    dq, dk, dv = (torch.zeros_like(t) for t in (x.q, x.k, x.v))
    for n, at_q, at_k, part in sequences(x):
        out, m, l = (t[:, :, at_q] for t in residuals)
        d_lse_here = None if d_lse is None else d_lse[:, :, at_q]
        here = backward_sequence(part, (out, m, l), d_out[:, :, at_q], d_lse_here, None, False, n)
        dq[:, :, at_q], dk[:, :, at_k], dv[:, :, at_k] = here[:3]
    return dq, dk, dv, None
