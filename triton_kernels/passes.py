"""The passes: what each allocates, and with which arguments its kernels run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn.spec import DecodeOperands, Operands

from . import config
from .arguments import (
    Tiles,
    ceil,
    dense,
    document_table,
    flags_of,
    key_of,
    mask_of,
    numbers_of,
    plans,
    power_of_two,
    remember,
    rows,
    sequences,
    view,
)
from .backward import Over, attn_backward_bias, attn_backward_keys, attn_backward_queries, attn_delta
from .decode import attn_combine, attn_decode
from .forward import attn_forward
from .tile import Flags
from .weights import attn_weights

Forward = tuple[Tensor, Tensor, Tensor]


def forward(x: Operands) -> Forward:
    """(out, m, l)."""
    q, k, v = rows(x.q), rows(x.k), rows(x.v)
    N, H, L, _ = q.shape
    B, longest, _ = sequences(x)
    dead = x.cu_seqlens_q is not None or k.shape[2] == 0  # rows that no program may reach
    out = (q.new_zeros if dead else q.new_empty)(N, L, H, v.shape[3]).transpose(1, 2)
    m = torch.empty((N, H, L), dtype=torch.float32, device=q.device)
    l = torch.empty((N, H, L), dtype=torch.float32, device=q.device)
    if dead:
        m.fill_(-torch.inf)
        l.zero_()
    if out.numel() == 0 or k.shape[2] == 0 or B * longest == 0:
        return out, m, l
    key = key_of("forward", x, q, k, v)
    plan = plans.get(key)
    if plan is None:
        tiles = Tiles(flags_of(x, q, k, v), q, key[0])
        plan = remember(key, tiles.streaming(k, v).entry("forward", attn_forward))
    entry, tile = plan
    blocks = ceil(longest, tile.rows)
    table = document_table(x.ids_q, x.ids_k, tile.rows, tile.keys)
    masks, numbers = mask_of(x, None), numbers_of(x, H // k.shape[1], k.shape[2], x.dropout_p)
    entry(blocks * H * B, (view(q), view(k), view(v), view(out), m, l, masks, numbers, table, blocks), q.device.index)
    return out, m, l


def weights(x: Operands, m: Tensor, l: Tensor, average: bool) -> Tensor:
    """Probabilities after dropout: (B, L, S) averaged over heads, or (B, Hq, L, S)."""
    q, k = rows(x.q), rows(x.k)
    B, H, L, _ = q.shape
    S = k.shape[2]
    w = q.new_empty((B, L, S) if average else (B, H, L, S))
    if w.numel() == 0 or H == 0:
        return w.zero_()
    key = key_of("weights", x, q, k, k, average)
    plan = plans.get(key)
    if plan is None:
        tiles = Tiles(flags_of(x, q, k, k), q, key[0])
        plan = remember(key, tiles.entry("weights", attn_weights, AVERAGE=average))
    entry, tile = plan
    blocks = ceil(L, tile.rows) * ceil(S, tile.keys)
    masks = mask_of(x, None)
    numbers = numbers_of(x, H // k.shape[1], S, x.dropout_p, 1.0 / H if average else 1.0)
    args = (view(q), view(k), m, l, dense(w[:, None] if average else w), masks, numbers, blocks)
    entry(blocks * (1 if average else H) * B, args, q.device.index)
    return w


class _Plan:
    """The kernels of one kind of backward call, each with its tile."""

    def __init__(self, x: Operands, tensors: tuple[Tensor, ...], direct: bool, d_weights: bool) -> None:
        q, k, v, d_out = tensors
        flags = flags_of(x, q, k, v)._replace(D_WEIGHTS=d_weights)
        tiles = Tiles(flags, q, direct)
        over_keys, over_rows = tiles.streaming(k, v), tiles.streaming(q, d_out)
        kept = {n: getattr(flags, n) for n in ("BIAS", "VARLEN", "QUERY_LENGTHS")}
        self.delta = tiles.entry("delta", attn_delta, Flags(0, flags.DV, 0, flags.BDV, **kept))
        self.add_weights = tiles.entry("queries", attn_backward_queries, DELTA=True) if d_weights else None
        one_pass = not torch.are_deterministic_algorithms_enabled() and tiles.one_pass()
        names = config.parts(tiles.dim, one_pass)
        self.keys = [over_rows.entry(n, attn_backward_keys, PART=n) for n in names]
        self.queries = None if one_pass else over_keys.entry("queries", attn_backward_queries, DELTA=False)
        self.bias, self.over = None, Over(False, False, False, False)
        if x.bias is not None:
            one = [n == 1 < full for n, full in zip(x.bias.shape, (*q.shape[:3], k.shape[2]), strict=True)]
            # Where rows or columns are summed, batches and heads are left to a second sum: more programs at work.
            inside = not (one[2] or one[3])
            self.over = Over(one[0] and inside, one[1] and inside, one[2], one[3])
            self.bias = tiles.entry("bias", attn_backward_bias, OVER=self.over)


def backward(
    x: Operands,
    residuals: Forward,
    d_out: Tensor,
    d_lse: Tensor | None,
    d_weights: Tensor | None,
    needs_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, d_bias)."""
    q, k, v, out, d_out = (rows(t) for t in (x.q, x.k, x.v, residuals[0], d_out))
    B, longest, longest_k = sequences(x)
    if out.numel() == 0 or q.numel() == 0 or B * longest * longest_k == 0:
        d_bias = torch.zeros_like(x.bias) if needs_bias_grad and x.bias is not None else None
        return _gradient(q, True), _gradient(k, True), _gradient(v, True), d_bias
    if d_weights is not None and d_weights.dim() == 3:
        d_weights = d_weights[:, None]
    d_lse = None if d_lse is None else d_lse.contiguous()
    deterministic = torch.are_deterministic_algorithms_enabled()
    key = key_of("backward", x, q, k, v, d_out, out, d_lse, d_weights, deterministic)
    plan = plans.get(key)
    if plan is None:
        plan = remember(key, _Plan(x, (q, k, v, d_out), key[0], d_weights is not None))

    packed, index = x.cu_seqlens_q is not None, q.device.index
    N, H, L, _ = q.shape
    Hk, S = k.shape[1], k.shape[2]
    padded = (ceil(L, 128) + (B if packed else 0)) * 128
    share = 1.0 / H if d_weights is not None and d_weights.shape[1] != H else 1.0
    masks, numbers = mask_of(x, d_weights), numbers_of(x, H // Hk, S, x.dropout_p, share)
    r = torch.empty((N, H, padded), dtype=torch.float32, device=q.device)
    delta = torch.empty((N, H, padded), dtype=torch.float32, device=q.device)
    dq, dk, dv = _gradient(q, packed), _gradient(k, packed), _gradient(v, packed)

    entry, tile = plan.delta
    blocks = ceil(longest, 128) * 128 // tile.rows
    args = (view(out), view(d_out), d_lse, *residuals[1:], r, delta, masks, numbers, padded, blocks)
    entry(blocks * H * B, args, index)
    given = (view(q), view(k), view(v), view(d_out), residuals[1], r, delta)
    for entry, tile in [p for p in (plan.add_weights, plan.queries) if p is not None]:
        blocks = ceil(longest, tile.rows)
        table = document_table(x.ids_q, x.ids_k, tile.rows, tile.keys)
        entry(blocks * H * B, (*given, view(dq), masks, numbers, table, padded, blocks), index)
    to_dq = None
    if plan.queries is None:
        to_dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    for entry, tile in plan.keys:
        blocks = ceil(longest_k, tile.keys)
        table = document_table(x.ids_k, x.ids_q, tile.keys, tile.rows)
        views = (None if to_dq is None else view(to_dq), view(dk), view(dv))
        entry(blocks * Hk * B, (*given, *views, masks, numbers, table, padded, blocks), index)
    if to_dq is not None:
        dq.copy_(to_dq)
    if plan.bias is None or not needs_bias_grad or x.bias is None:
        return dq, dk, dv, None
    return dq, dk, dv, _bias_gradient(plan, x.bias, given, (masks, numbers, padded, B))


def _bias_gradient(plan: _Plan, bias: Tensor, given: tuple[Any, ...], rest: tuple[Any, ...]) -> Tensor:
    """dS summed over what the bias was broadcast along."""
    entry, tile = plan.bias
    over, q = plan.over, given[0].ptr
    B, H, L, _ = q.shape
    S = given[1].ptr.shape[2]
    shape = [1 if summed else n for n, summed in zip((B, H, L, S), over, strict=True)]
    total = torch.empty(shape, dtype=torch.float32, device=q.device)
    blocks = (1 if over.row else ceil(L, tile.rows)) * (1 if over.col else ceil(S, tile.keys))
    entry(blocks * shape[0] * shape[1], (*given, dense(total), *rest, blocks), q.device.index)
    return total.sum_to_size(bias.shape).to(bias.dtype)


def _gradient(t: Tensor, zero: bool) -> Tensor:
    """A gradient of t laid out as (B, L, H, D)."""
    B, H, L, D = t.shape
    return (t.new_zeros if zero else t.new_empty)(B, L, H, D).transpose(1, 2)


def decode(x: DecodeOperands) -> tuple[Tensor, Tensor]:
    """(out (B, Hq, Lq, Dv), lse (B, Hq, Lq))."""
    q, k, v = rows(x.q), rows(x.k_cache), rows(x.v_cache)
    B, H, L, _ = q.shape
    Hk, page_size, DV = k.shape[1], k.shape[2], v.shape[3]
    paged = x.block_table is not None
    pages, slots = (k.shape[0], x.block_table.shape[1]) if paged else (0, 0)
    capacity = page_size * slots if paged else page_size
    out = q.new_empty(B, L, H, DV).transpose(1, 2)
    lse = torch.empty((B, H, L), dtype=torch.float32, device=q.device)
    if lse.numel() == 0 or k.numel() == 0 or capacity == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    as_operands = Operands(
        *(q, k, v),
        alibi_slopes=x.alibi_slopes,
        key_lengths=x.lengths,
        left=x.left,
        right=x.right,
        end=True,
        scale=x.scale,
        softcap=x.softcap,
    )
    group = H // Hk
    key = key_of("decode", as_operands, q, k, v, x.block_table)
    plan = plans.get(key)
    if plan is None:
        tiles = Tiles(flags_of(as_operands, q, k, v), q, key[0])
        plan = remember(key, _DecodePlan(tiles, group * L, B * Hk, capacity, paged))
    splits, tile = plan.splits, plan.tile
    parts: tuple[Tensor | None, ...] = (None, None, None)
    if splits > 1:
        sizes = ((B, H, L, splits, DV), (B, H, L, splits), (B, H, L, splits))
        parts = tuple(torch.empty(s, dtype=torch.float32, device=q.device) for s in sizes)
    numbers = numbers_of(as_operands, group, capacity)
    blocks = ceil(group * L, tile.rows)
    table = None if x.block_table is None else x.block_table.contiguous()
    args = (
        *(view(q), view(k), view(v), view(out), lse, *parts),
        *(mask_of(as_operands, None), table, numbers, (blocks, pages, page_size, slots), splits),
    )
    plan.entry(splits * blocks * Hk * B, args, q.device.index)
    if splits > 1:
        plan.combine(B * H * L, (view(out), lse, *parts, numbers, splits), q.device.index)
    return out, lse


class _DecodePlan:
    """The kernels of one kind of decoding step, and in how many parts they split the keys."""

    def __init__(self, tiles: Tiles, packed_rows: int, heads: int, capacity: int, paged: bool) -> None:
        tile = config.tile(tiles.arch, "decode", tiles.dim, tiles.itemsize, tiles.heavy)
        self.tile = tile._replace(rows=min(64, max(tile.rows, power_of_two(packed_rows))))
        programs = heads * ceil(packed_rows, self.tile.rows)
        wanted = ceil(2 * config.processors(tiles.device), programs)
        self.splits = max(1, min(wanted, ceil(capacity, 4 * self.tile.keys), config.MOST_SPLITS))
        split = self.splits > 1
        flags = tiles.flags
        self.entry = tiles.with_tile(self.tile, attn_decode, flags, PAGED=paged, SPLIT=split)
        self.combine = tiles.with_tile(
            config.Tile(0, 0, 4, 1), attn_combine, flags, SPLITS=max(2, power_of_two(self.splits, 2))
        )
