"""Attention as plain torch: the definition that every kernel is held against.

For query i and key j of one head:

1. s = scale * q_i . k_j                         (float32; float64 for float64 inputs)
2. s = softcap * tanh(s / softcap)               if softcap > 0
3. s = s - slope * |i + S - L - j| + bias_ij     ALiBi, bias
4. s = -inf where the mask hides                 after scale, softcap and bias
5. m_i = max_j s_ij, l_i = sum_j exp(s_ij - m_i), w_ij = exp(s_ij - m_i) / l_i, lse_i = m_i + log l_i
6. w_ij = w_ij / (1 - p) where dropout keeps, else 0
7. out_i = sum_j w_ij v_j

A row without a visible key is dead: out 0, weights 0, m and lse -inf, l 0, gradient 0. What lies past `key_lengths` or
`query_lengths` is never read, NaN included. A NaN in a visible score stays in its row.

`attend` is differentiable to any order and in forward mode; `forward`, `weights` and `backward` are the passes that
the kernels implement, on the same residuals m and l.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn import masks, rng
from attn.spec import DecodeOperands, Operands

NEG_INF = -torch.inf


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lse_of(m: Tensor, l: Tensor) -> Tensor:
    """The log-sum-exp of each row, natural log; -inf for a dead row."""
    return torch.where(l == 0, NEG_INF, m + torch.log(torch.where(l == 0, 1.0, l)))


def attend(x: Operands, weights: str = "") -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, lse, weights or None) in plain differentiable torch. `weights` is "", "mean" (over heads) or "heads"."""
    if x.cu_seqlens_q is not None:
        out, m, l = _per_sequence(x, _forward)
        return out, lse_of(m, l), None
    p, m, l, kept = _probabilities(x)
    out = _times_values(x, kept).to(x.q.dtype)
    w = None if not weights else (kept.mean(1) if weights == "mean" else kept).to(x.q.dtype)
    return out, lse_of(m, l), w


def forward(x: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """(out, m, l)."""
    return _per_sequence(x, _forward) if x.cu_seqlens_q is not None else _forward(x)


def forward_weights(x: Operands, average: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, m, l, weights): one pass over the scores for both."""
    _, m, l, kept = _probabilities(x)
    return _times_values(x, kept).to(x.q.dtype), m, l, (kept.mean(1) if average else kept).to(x.q.dtype)


def weights(x: Operands, m: Tensor, l: Tensor, average: bool) -> Tensor:
    """Probabilities after dropout from the residuals: (B, L, S) averaged over heads, or (B, Hq, L, S)."""
    kept = _dropped(x, _from_residuals(x, scores(x)[0], m, l))
    return (kept.mean(1) if average else kept).to(x.q.dtype)


def backward(
    x: Operands,
    residuals: tuple[Tensor, Tensor, Tensor],
    d_out: Tensor,
    d_lse: Tensor | None = None,
    d_weights: Tensor | None = None,
    needs_bias_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, d_bias). With P the probabilities, dP = d_out Vᵀ and delta = rowsum(P dP) - d_lse: dS = P (dP - delta)."""
    if x.cu_seqlens_q is not None:
        return _backward_per_sequence(x, residuals, d_out, d_lse)
    out, m, l = residuals
    acc = accumulate_dtype(x.q.dtype)
    s, d_cap, seen = scores(x)
    p = _from_residuals(x, s, m, l)
    q, k, v = _within_lengths(x)
    g = _hide_rows(x, d_out.to(acc))
    dp = g @ _per_query_head(x, v).transpose(-1, -2)
    delta = (g * _hide_rows(x, out.to(acc))).sum(-1)
    if d_weights is not None:
        share = d_weights.to(acc) if d_weights.dim() == 4 else d_weights.to(acc)[:, None] / x.q.shape[1]
        if seen is not None:
            share = torch.where(seen, share, 0.0)
        delta = delta + (_dropped(x, p) * share).sum(-1)
        dp = dp + share
    if d_lse is not None:
        delta = delta - torch.where(l == 0, 0.0, d_lse.to(acc))
    dv = _per_key_head(x, _dropped(x, p).transpose(-1, -2) @ g)
    ds = p * (_dropped(x, dp) - delta[..., None])
    d_bias = None
    if needs_bias_grad and x.bias is not None:
        d_bias = ds.sum_to_size(x.bias.shape).to(x.bias.dtype)
    if d_cap is not None:
        ds = ds * d_cap
    ds = ds * x.scale
    dq = ds @ _per_query_head(x, k)
    dk = _per_key_head(x, ds.transpose(-1, -2) @ q)
    return dq.to(x.q.dtype), dk.to(x.k.dtype), dv.to(x.v.dtype), d_bias


def decode(x: DecodeOperands) -> tuple[Tensor, Tensor]:
    """(out, lse) of Lq new queries per sequence against a contiguous or paged cache; end-anchored."""
    k, v = (_gather_pages(c, x.block_table) for c in (x.k_cache, x.v_cache))
    dense = Operands(
        x.q,
        k,
        v,
        alibi_slopes=x.alibi_slopes,
        key_lengths=x.lengths.clamp(0, k.shape[2]).to(torch.int32),
        left=x.left,
        right=x.right,
        end=True,
        scale=x.scale,
        softcap=x.softcap,
    )
    out, m, l = _forward(dense)
    return out, lse_of(m, l)


def scores(x: Operands) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(scores (B, Hq, L, S) with -inf where hidden, derivative of the softcap or None, visibility or None)."""
    q, k, _ = _within_lengths(x)
    L, S = q.shape[2], k.shape[2]
    s = q @ _per_query_head(x, k).transpose(-1, -2) * x.scale
    d_cap = None
    if x.softcap > 0:
        t = torch.tanh(s / x.softcap)
        s, d_cap = x.softcap * t, 1 - t * t
    if x.alibi_slopes is not None:
        lq, lk = masks.lengths_of(x, L, S)
        i = torch.arange(L, device=q.device).view(1, 1, L, 1)
        j = torch.arange(S, device=q.device).view(1, 1, 1, S)
        s = s - x.alibi_slopes.to(s.dtype)[:, :, None, None] * (i + lk - lq - j).abs()
    if x.bias is not None:
        s = s + x.bias.to(s.dtype)
    seen = masks.visibility(x, L, S)
    if seen is not None:
        s = s.masked_fill(~seen, NEG_INF)
    return s, d_cap, seen


def _forward(x: Operands, first_batch: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    _, m, l, kept = _probabilities(x, first_batch)
    return _times_values(x, kept).to(x.q.dtype), m, l


def _probabilities(x: Operands, first_batch: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(P, m, l, P after dropout)."""
    s, _, _ = scores(x)
    m = s.amax(-1).detach() if s.shape[-1] else s.new_full(s.shape[:-1], NEG_INF)
    e = torch.exp(s - _finite(m)[..., None])
    l = e.sum(-1)
    p = e / torch.where(l == 0, 1.0, l)[..., None]
    return p, m, l, _dropped(x, p, first_batch)


def _finite(m: Tensor) -> Tensor:
    """m, with 0 for dead rows: exp(-inf - 0) is the 0 wanted there, exp(-inf + inf) would be NaN."""
    return m.masked_fill(m == NEG_INF, 0.0)


def _from_residuals(x: Operands, s: Tensor, m: Tensor, l: Tensor) -> Tensor:
    return torch.exp(s - _finite(m)[..., None]) / torch.where(l == 0, 1.0, l)[..., None]


def _dropped(x: Operands, p: Tensor, first_batch: int = 0) -> Tensor:
    if x.rng is None:
        return p
    if x.dropout_p >= 1:
        return torch.zeros_like(p)
    B, H, L, S = p.shape
    kept = rng.keep_mask(x.rng, x.dropout_p, B, H, L, S, first_batch)
    return torch.where(kept, p / (1 - x.dropout_p), 0.0)


def _times_values(x: Operands, p: Tensor) -> Tensor:
    return p @ _per_query_head(x, _within_lengths(x)[2])


def _hide_rows(x: Operands, t: Tensor) -> Tensor:
    """Zero the rows past query_lengths."""
    if x.query_lengths is None:
        return t
    past = torch.arange(t.shape[2], device=t.device).view(1, 1, -1, 1) >= x.query_lengths.view(-1, 1, 1, 1)
    return t.masked_fill(past, 0.0)


def _within_lengths(x: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in the accumulation dtype, zeroed past the lengths so that nothing behind them can spread."""
    acc = accumulate_dtype(x.q.dtype)
    q, k, v = x.q.to(acc), x.k.to(acc), x.v.to(acc)
    if x.key_lengths is not None:
        past = torch.arange(k.shape[2], device=k.device).view(1, 1, -1, 1) >= x.key_lengths.view(-1, 1, 1, 1)
        k, v = k.masked_fill(past, 0.0), v.masked_fill(past, 0.0)
    return _hide_rows(x, q), k, v


def _per_query_head(x: Operands, t: Tensor) -> Tensor:
    """(B, Hkv, ...) repeated to (B, Hq, ...)."""
    group = x.q.shape[1] // t.shape[1]
    return t if group == 1 else t.repeat_interleave(group, 1)


def _per_key_head(x: Operands, t: Tensor) -> Tensor:
    """(B, Hq, ...) summed over each group to (B, Hkv, ...)."""
    heads = x.k.shape[1]
    return t if heads == t.shape[1] else t.unflatten(1, (heads, -1)).sum(2)


def _gather_pages(cache: Tensor, table: Tensor | None) -> Tensor:
    """(blocks, Hkv, block_size, D) pages to (B, Hkv, n * block_size, D)."""
    if table is None:
        return cache
    pages = cache[table.clamp(0, cache.shape[0] - 1).long()]  # (B, n, Hkv, block_size, D)
    return pages.transpose(1, 2).flatten(2, 3)


def sequences(x: Operands) -> list[tuple[int, slice, slice, Operands]]:
    """A packed call as its sequences: (index, token slices of q and k, the sequence as a call of its own)."""
    ends_q, ends_k = x.cu_seqlens_q.tolist(), x.cu_seqlens_k.tolist()  # type: ignore[union-attr]
    out = []
    for n in range(len(ends_q) - 1):
        at_q, at_k = slice(ends_q[n], ends_q[n + 1]), slice(ends_k[n], ends_k[n + 1])
        slopes = None if x.alibi_slopes is None else x.alibi_slopes[n : n + 1]
        part = x._replace(
            q=x.q[:, :, at_q],
            k=x.k[:, :, at_k],
            v=x.v[:, :, at_k],
            alibi_slopes=slopes,
            prefix=None if x.prefix is None else x.prefix[n : n + 1],
            cu_seqlens_q=None,
            cu_seqlens_k=None,
        )
        out.append((n, at_q, at_k, part))
    return out


def _per_sequence(x: Operands, run: object) -> tuple[Tensor, Tensor, Tensor]:
    B, H, L, _ = x.q.shape
    acc = accumulate_dtype(x.q.dtype)
    parts = [run(part, n) for n, _, _, part in sequences(x)]  # type: ignore[operator]
    rest = L - sum(p[0].shape[2] for p in parts)
    parts.append(
        (
            x.q.new_zeros(B, H, rest, x.v.shape[-1]),
            torch.full((B, H, rest), NEG_INF, dtype=acc, device=x.q.device),
            x.q.new_zeros(B, H, rest, dtype=acc),
        )
    )
    out, m, l = (torch.cat(column, 2) for column in zip(*parts, strict=True))
    return out, m, l


def _backward_per_sequence(
    x: Operands, residuals: tuple[Tensor, Tensor, Tensor], d_out: Tensor, d_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    grads = tuple(torch.zeros_like(t) for t in (x.q, x.k, x.v))
    raise_if_dropout = x.rng
    for n, at_q, at_k, part in sequences(x):
        here = tuple(t[:, :, at_q] for t in residuals)
        one = backward(part, here, d_out[:, :, at_q], None if d_lse is None else d_lse[:, :, at_q])  # type: ignore[arg-type]
        for total, at, g in zip(grads, (at_q, at_k, at_k), one[:3], strict=True):
            total[:, :, at] = g
    return (*grads, None)
