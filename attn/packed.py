"""The public calls on packed sequences and on a key-value cache."""

from __future__ import annotations

import torch
from torch import Tensor

from attn import masks, ops, planner
from attn.functional import run
from attn.masks import Mask
from attn.operands import (
    QKV,
    arch,
    band_fields,
    cast_under_autocast,
    check_dropout,
    check_dtype,
    check_qkv,
    check_range,
    scale_of,
    slopes_of,
    softcap_of,
    values_known,
)
from attn.spec import UNBOUNDED, AttentionSpec, DecodeOperands, Operands


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    mask: Mask | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over sequences packed one after another; no token sees another sequence.

    Args:
        q: (Tq, Hq, D): the tokens of all sequences.
        k: (Tk, Hkv, D) with Hq a multiple of Hkv.
        v: (Tk, Hkv, Dv).
        cu_seqlens_q: int32 (B + 1,): sequence n holds rows cu_seqlens_q[n] to cu_seqlens_q[n + 1] of q.
        cu_seqlens_k: int32 (B + 1,), likewise for k and v.
        max_seqlen_q: an upper bound of the sequence lengths; None finds it on CPU and takes Tq elsewhere.
        max_seqlen_k: likewise.
        mask: None, or a band (causal, window, prefix_lm), applied to each sequence with its own lengths.
        alibi_slopes: (Hq,) or (B, Hq).
        dropout_p: as in `attn.attention`; the bits are those of sequence n as batch index n, positions local.
        scale: as in `attn.attention`.
        softcap: as in `attn.attention`.
        return_lse: also return the log-sum-exp (Hq, Tq).
        backend: as in `attn.attention`.

    Returns:
        out (Tq, Hq, Dv), rows past the last sequence 0; with `return_lse` also lse.

    Raises:
        TypeError, ValueError: as `attn.attention`; on CPU also for cu_seqlens that do not start at 0, decrease or end
            past the tokens, and for a max_seqlen below a sequence's length.
        RuntimeError: a forced backend cannot run the call.
    """
    check_qkv(q, k, v, QKV, dims=3)
    if v.shape[:2] != k.shape[:2] or (q.shape[1] != k.shape[1] and (k.shape[1] == 0 or q.shape[1] % k.shape[1])):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: key and value must agree in tokens and "
            "heads, and query heads must be a multiple of key heads"
        )
    q, k, v = cast_under_autocast(q, k, v)
    check_dtype(q, k, v, QKV)
    if dropout_p != 0.0:
        check_dropout(dropout_p)
    cu_q, max_q = _cumulative("q", cu_seqlens_q, max_seqlen_q, q)
    cu_k, max_k = _cumulative("k", cu_seqlens_k, max_seqlen_k, k)
    B = cu_q.shape[0] - 1
    if cu_k.shape[0] != B + 1:
        raise ValueError(
            f"cu_seqlens_q has {B + 1} entries and cu_seqlens_k {cu_k.shape[0]}; they must be equally many"
        )
    rows = [t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
    x = Operands(
        rows[0],
        rows[1],
        rows[2],
        alibi_slopes=None if alibi_slopes is None else slopes_of(alibi_slopes, B, q.shape[1], q.device),
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        scale=scale_of(scale, q.shape[-1]),
        softcap=0.0 if softcap is None else softcap_of(softcap),
        dropout_p=dropout_p,
    )
    if mask is not None:
        x = x._replace(**band_fields(_only_band(mask), B, q.device))
    out, lse, _ = run(x, return_lse, "", backend)
    out = out[0].transpose(0, 1)
    return out if lse is None else (out, lse[0])


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    lengths: Tensor,
    block_table: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention of a few new queries per sequence to a key-value cache. No gradients.

    The new queries are the last Lq of the lengths[b] valid keys: query i sits at position lengths[b] - Lq + i and sees
    the keys up to there. Paged caches: Kwon et al. 2023.

    Args:
        q: (B, Hq, Lq, D), Lq small.
        k_cache: (B, Hkv, S_max, D), or (blocks, Hkv, block_size, D) with `block_table`.
        v_cache: likewise, with Dv.
        lengths: integer (B,): valid keys, those of the new queries included.
        block_table: integer (B, n): the pages of each sequence in order.
        window: (left, right) as in `attn.masks.window`; the right side never passes the query's own position.
        alibi_slopes: (Hq,) or (B, Hq).
        scale: as in `attn.attention`.
        softcap: as in `attn.attention`.
        return_lse: also return the log-sum-exp (B, Hq, Lq).
        backend: as in `attn.attention`.

    Returns:
        out (B, Hq, Lq, Dv) in q's dtype, 0 where lengths[b] < Lq leaves a query no key; with `return_lse` also lse.

    Raises:
        TypeError, ValueError: as `attn.attention`; on CPU also for lengths outside [0, capacity] and for page numbers
            in use that point outside the cache.
        RuntimeError: an input requires grad, or a forced backend cannot run the call.
    """
    names = ("q", "k_cache", "v_cache")
    check_qkv(q, k_cache, v_cache, names)
    if torch.is_grad_enabled() and (q.requires_grad or k_cache.requires_grad or v_cache.requires_grad):
        raise RuntimeError("decode_attention has no gradient; call it under torch.no_grad(), or use attn.attention")
    q, k_cache, v_cache = cast_under_autocast(q, k_cache, v_cache)
    check_dtype(q, k_cache, v_cache, names)
    B, H, _, D = q.shape
    heads = k_cache.shape[1]
    if v_cache.shape[:3] != k_cache.shape[:3] or (heads != H and (heads == 0 or H % heads)):
        raise ValueError(
            f"q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}: the caches must "
            "agree in all but head_dim, and query heads must be a multiple of theirs"
        )
    capacity = k_cache.shape[2]
    _integers("lengths", lengths, q.device)
    if lengths.dim() != 1 or lengths.shape[0] != B:
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}; it must be ({B},)")
    if block_table is None:
        if k_cache.shape[0] != B:
            raise ValueError(f"k_cache has batch size {k_cache.shape[0]}, q has {B}; a paged cache needs block_table")
    else:
        capacity = _check_pages(block_table, B, k_cache, q.device) * capacity
    check_range("lengths", lengths, 0, capacity)
    if block_table is not None:
        _check_pages_in_use(block_table, lengths, k_cache)
        block_table = block_table.to(torch.int32)
    x = DecodeOperands(
        q,
        k_cache,
        v_cache,
        lengths.to(torch.int32),
        block_table,
        None if alibi_slopes is None else slopes_of(alibi_slopes, B, H, q.device),
        left=UNBOUNDED if window is None else _left(window),
        scale=scale_of(scale, D),
        softcap=0.0 if softcap is None else softcap_of(softcap),
    )
    chosen = planner.choose(decode_spec(x), backend)
    out, lse = ops.decode(*x, chosen.name)
    return (out, lse) if return_lse else out


def decode_spec(x: DecodeOperands) -> AttentionSpec:
    """The static description of a decoding step."""
    device = x.q.device
    return AttentionSpec(
        op="decode",
        device=device.type,
        dtype=x.q.dtype,
        arch=arch(device),
        head_dim=int(x.q.shape[-1]),
        value_dim=int(x.v_cache.shape[-1]),
        grouped=bool(x.q.shape[1] != x.k_cache.shape[1]),
        band="end",
        causal=bool(x.left == UNBOUNDED),
        key_lengths=True,
        alibi=x.alibi_slopes is not None,
        softcap=bool(x.softcap > 0),
        scale_positive=bool(x.scale > 0),
        paged=x.block_table is not None,
        lse=True,
    )


def _cumulative(side: str, t: Tensor, largest: int | None, tokens: Tensor) -> tuple[Tensor, int]:
    """cu_seqlens as int32, checked, and the bound of its lengths."""
    name, total = f"cu_seqlens_{side}", tokens.shape[0]
    _integers(name, t, tokens.device)
    if t.dim() != 1 or t.shape[0] < 1:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be (B + 1,)")
    if largest is not None and largest < 0:
        raise ValueError(f"max_seqlen_{side} is {largest}; it must be >= 0")
    t = t.to(torch.int32).contiguous()
    if not values_known(t):
        return t, total if largest is None else largest
    if int(t[0]) != 0:
        raise ValueError(f"{name}[0] is {int(t[0])}; it must be 0")
    lengths = t.diff()
    check_range(f"{name}.diff()", lengths, 0, None)
    if int(t[-1]) > total:
        raise ValueError(f"{name}[{t.shape[0] - 1}] is {int(t[-1])}; there are only {total} tokens")
    found = int(lengths.max()) if lengths.numel() else 0
    if largest is not None and largest < found:
        raise ValueError(f"max_seqlen_{side} is {largest}; the longest sequence in {name} has {found} tokens")
    return t, found if largest is None else largest


def _only_band(mask: Mask) -> Mask:
    if not isinstance(mask, Mask):
        raise TypeError(f"mask is {type(mask).__name__}; varlen_attention takes a band of attn.masks, or None")
    parts = (mask.key_lengths, mask.query_lengths, mask.ids_q, mask.dense)
    if mask.also or any(p is not None for p in parts):
        raise ValueError(f"mask is {mask}; varlen_attention takes one band: causal, window or prefix_lm")
    return mask


def _check_pages(table: Tensor, B: int, cache: Tensor, device: torch.device) -> int:
    """Pages per sequence."""
    _integers("block_table", table, device)
    if table.dim() != 2 or table.shape[0] != B:
        raise ValueError(f"block_table has shape {tuple(table.shape)}; it must be ({B}, pages per sequence)")
    if cache.shape[2] == 0:
        raise ValueError(f"k_cache has shape {tuple(cache.shape)}; block_size (dim 2) must be >= 1")
    return int(table.shape[1])


def _check_pages_in_use(table: Tensor, lengths: Tensor, cache: Tensor) -> None:
    if not (values_known(table) and values_known(lengths)) or table.numel() == 0:
        return
    pages = -(-lengths // cache.shape[2])
    used = torch.arange(table.shape[1], device=table.device) < pages[:, None]
    check_range("block_table", table.masked_fill(~used, 0), 0, max(cache.shape[0] - 1, 0))
    if cache.shape[0] == 0 and bool(used.any()):
        raise ValueError("k_cache has no pages, but lengths use some")


def _integers(name: str, t: Tensor, device: torch.device) -> None:
    if not isinstance(t, Tensor) or t.dtype not in (torch.int32, torch.int64):
        kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} is {kind}; give an int32 tensor")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}, the query on {device}; move it there")


def _left(window: tuple[int | None, int | None]) -> int:
    band = masks.window(*window).band
    return UNBOUNDED if band is None or band.left is None else band.left
