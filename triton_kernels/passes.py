"""The passes: what each allocates, and with which arguments its kernels run."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from attn.spec import DecodeOperands, Operands

from . import config, tune
from .arguments import (
    NO_MASK,
    Tiles,
    ceil,
    dense,
    document_table,
    flags_of,
    key_of,
    mask_of,
    numbers_of,
    plain,
    plans,
    power_of_two,
    remember,
    rows,
    sequences,
    view,
)
from .backward import Over, Stats, attn_backward_bias, attn_backward_keys, attn_backward_queries, attn_delta
from .call import Flags, odd
from .decode import attn_combine, attn_decode
from .forward import attn_forward
from .weights import attn_weights

Forward = tuple[Tensor, Tensor, Tensor]


class _Plan:
    """What is the same in all calls of one key: sizes, numbers, and kernels with their tiles and grids."""

    def __init__(self, x: Operands, tensors: tuple[Tensor, ...], direct: bool, share: float = 1.0) -> None:
        q, k, v, *more = tensors
        self.plain = plain(x)
        self.packed = x.cu_seqlens_q is not None
        self.B, self.longest, self.longest_k = sequences(x)
        self.H, self.Hk = q.shape[1], k.shape[1]
        self.padded = (ceil(q.shape[2], 128) + (self.B if self.packed else 0)) * 128
        self.numbers = numbers_of(x, self.H // max(self.Hk, 1), k.shape[2], self.padded, share)
        self.tiles = Tiles(flags_of(x, q, k, v, *more), q, direct)

    def rows(self, tile: config.Tile) -> tuple[int, int]:
        """(blocks, programs) of a kernel that takes blocks of query rows."""
        blocks = ceil(self.longest, tile.rows)
        return blocks, blocks * self.H * self.B

    def keys(self, tile: config.Tile) -> tuple[int, int]:
        """(blocks, programs) of a kernel that takes blocks of keys."""
        blocks = ceil(self.longest_k, tile.keys)
        return blocks, blocks * self.Hk * self.B


class _ForwardPlan(_Plan):
    def __init__(self, x: Operands, q: Tensor, k: Tensor, v: Tensor, direct: bool) -> None:
        super().__init__(x, (q, k, v), direct)
        self.entry, self.tile = self.tiles.streaming(k, v).entry("forward", attn_forward)
        self.blocks, self.grid = self.rows(self.tile)
        N, H, L, _ = q.shape
        DV = v.shape[3]
        self.shape, self.strides = (N, H, L, DV), (L * H * DV, DV, H * DV, 1)
        self.dead = self.packed or k.shape[2] == 0  # rows that no program may reach
        self.skip = self.grid == 0 or k.shape[2] == 0 or DV == 0


def forward(x: Operands) -> Forward:
    """(out, m, l)."""
    q, k, v = rows(x.q), rows(x.k), rows(x.v)
    key = key_of("forward", x, (q, k, v))
    plan = plans.get(key)
    if plan is None:
        plan = _ForwardPlan(x, q, k, v, key[0])
        if tune.wanted() and not plan.skip:
            tune.tune(plan.tiles, ("forward",), lambda: forward(x))
            plan = _ForwardPlan(x, q, k, v, key[0])
        remember(key, plan)
    out = q.new_empty_strided(plan.shape, plan.strides)
    m = q.new_empty(plan.shape[:3], dtype=torch.float32)
    l = q.new_empty(plan.shape[:3], dtype=torch.float32)
    if plan.dead:
        out.zero_()
        m.fill_(-torch.inf)
        l.zero_()
    if plan.skip:
        return out, m, l
    table = document_table(x.ids_q, x.ids_k, plan.tile.rows, plan.tile.keys)
    masks = NO_MASK if plan.plain else mask_of(x, None)
    args = (view(q), view(k), view(v), view(out), m, l, masks, plan.numbers, table, plan.blocks)
    plan.entry(plan.grid, args, q.device.index)
    return out, m, l


class _WeightsPlan(_Plan):
    def __init__(self, x: Operands, q: Tensor, k: Tensor, average: bool, direct: bool) -> None:
        super().__init__(x, (q, k, k), direct, 1.0 / q.shape[1] if average else 1.0)
        self.entry, tile = self.tiles.entry("weights", attn_weights, AVERAGE=average)
        self.blocks = ceil(self.longest, tile.rows) * ceil(self.longest_k, tile.keys)
        self.grid = self.blocks * (1 if average else self.H) * self.B


def weights(x: Operands, m: Tensor, l: Tensor, average: bool) -> Tensor:
    """Probabilities after dropout: (B, L, S) averaged over heads, or (B, Hq, L, S)."""
    q, k = rows(x.q), rows(x.k)
    B, H, L, _ = q.shape
    S = k.shape[2]
    w = q.new_empty((B, L, S) if average else (B, H, L, S))
    if w.numel() == 0 or H == 0:
        return w.zero_()
    key = key_of("weights", x, (q, k, m, l), average)
    plan = plans.get(key) or remember(key, _WeightsPlan(x, q, k, average, key[0]))
    to = dense(w[:, None] if average else w)
    args = (view(q), view(k), m, l, to, mask_of(x, None), plan.numbers, plan.blocks)
    plan.entry(plan.grid, args, q.device.index)
    return w


class _BackwardPlan(_Plan):
    """Kernels as lists of (entry, tile, blocks, grid), in the order of their launches."""

    def __init__(self, x: Operands, tensors: tuple[Tensor, ...], direct: bool, d_weights: Tensor | None) -> None:
        q, k, v, d_out, _ = tensors
        mean = d_weights is not None and d_weights.shape[1] != q.shape[1]
        super().__init__(x, tensors, direct, 1.0 / q.shape[1] if mean else 1.0)
        self.skip = not (self.B * self.longest * self.longest_k and q.numel() and k.numel() and v.numel())
        tiles = self.tiles
        tiles.flags = flags = tiles.flags._replace(D_WEIGHTS=d_weights is not None)
        over_keys, over_rows = tiles.streaming(k, v), tiles.streaming(q, d_out)
        kept = {n: getattr(flags, n) for n in ("EXACT", "VARLEN", "QUERY_LENGTHS", "ALIGN")}
        self.delta, tile = tiles.entry("delta", attn_delta, Flags(0, flags.DV, 0, flags.BDV, **kept))
        self.delta_blocks = ceil(self.longest, 128) * 128 // tile.rows
        self.by_rows, self.by_keys = [], []
        if d_weights is not None:
            self._add(self.by_rows, self.rows, tiles.entry("queries", attn_backward_queries, DELTA=True))
        self.one_pass = not torch.are_deterministic_algorithms_enabled() and tiles.one_pass()
        if not self.one_pass:
            self._add(self.by_rows, self.rows, over_keys.entry("queries", attn_backward_queries, DELTA=False))
        for name in config.parts(tiles.dim, self.one_pass):
            self._add(self.by_keys, self.keys, over_rows.entry(name, attn_backward_keys, PART=name))
        self.bias, self.over = None, Over(False, False, False, False)
        if x.bias is not None:
            one = [n == 1 < full for n, full in zip(x.bias.shape, (*q.shape[:3], k.shape[2]), strict=True)]
            # Where rows or columns are summed, batches and heads are left to a second sum: more programs at work.
            inside = not (one[2] or one[3])
            self.over = Over(one[0] and inside, one[1] and inside, one[2], one[3])
            self.bias = tiles.entry("bias", attn_backward_bias, OVER=self.over)

    def _add(self, to: list[Any], sizes: Any, made: tuple[Any, config.Tile]) -> None:
        to.append((*made, *sizes(made[1])))


def backward(
    x: Operands,
    residuals: Forward,
    d_out: Tensor,
    d_lse: Tensor | None,
    d_weights: Tensor | None,
    needs_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, d_bias)."""
    q, k, v, d_out, out = rows(x.q), rows(x.k), rows(x.v), rows(d_out), rows(residuals[0])
    m, l = residuals[1], residuals[2]
    if d_weights is not None and d_weights.dim() == 3:
        d_weights = d_weights[:, None]
    d_lse = None if d_lse is None else d_lse.contiguous()
    given = (q, k, v, d_out, out, m, l, d_lse, d_weights)
    key = key_of("backward", x, given, torch.are_deterministic_algorithms_enabled(), config.ONE_PASS)
    plan = plans.get(key)
    if plan is None:
        plan = _BackwardPlan(x, (q, k, v, d_out, out), key[0], d_weights)
        if tune.wanted() and not plan.skip:
            again = functools.partial(backward, x, residuals, d_out, d_lse, d_weights, needs_bias_grad)
            tune.tune(plan.tiles, (*config.parts(plan.tiles.dim, plan.one_pass), "queries"), again)
            plan = _BackwardPlan(x, (q, k, v, d_out, out), key[0], d_weights)
        remember(key, plan)
    dead = plan.packed or plan.skip
    dq, dk, dv = _gradient(q, dead), _gradient(k, dead), _gradient(v, dead)
    if plan.skip:
        return dq, dk, dv, torch.zeros_like(x.bias) if needs_bias_grad and x.bias is not None else None

    index, shape = q.device.index, (q.shape[0], plan.H, plan.padded)
    masks = NO_MASK if plan.plain and d_weights is None else mask_of(x, d_weights)
    stats = Stats(m, q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32))
    inputs = (view(q), view(k), view(v), view(d_out), stats)
    args = (view(out), inputs[3], d_lse, l, stats, masks, plan.numbers, plan.delta_blocks)
    plan.delta(plan.delta_blocks * plan.H * plan.B, args, index)
    to_dq = view(dq)
    for entry, tile, blocks, grid in plan.by_rows:
        table = document_table(x.ids_q, x.ids_k, tile.rows, tile.keys)
        entry(grid, (*inputs, to_dq, masks, plan.numbers, table, blocks), index)
    if plan.one_pass:
        to_dq = view(torch.zeros(q.shape, dtype=torch.float32, device=q.device))
    to = (to_dq if plan.one_pass else None, view(dk), view(dv))
    for entry, tile, blocks, grid in plan.by_keys:
        table = document_table(x.ids_k, x.ids_q, tile.keys, tile.rows)
        entry(grid, (*inputs, to, masks, plan.numbers, table, blocks), index)
    if plan.one_pass:
        dq.copy_(to_dq.ptr)
    if not needs_bias_grad or x.bias is None:
        return dq, dk, dv, None
    return dq, dk, dv, _bias_gradient(plan, x.bias, inputs, (masks, plan.numbers, plan.B))


def _bias_gradient(plan: _BackwardPlan, bias: Tensor, given: tuple[Any, ...], rest: tuple[Any, ...]) -> Tensor:
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
    made = t.new_empty_strided((B, H, L, D), (L * H * D, D, H * D, 1))
    return made.zero_() if zero else made


def decode(x: DecodeOperands) -> tuple[Tensor, Tensor]:
    """(out (B, Hq, Lq, Dv), lse (B, Hq, Lq))."""
    q, k, v = rows(x.q), rows(x.k_cache), rows(x.v_cache)
    B, H, L, _ = q.shape
    DV = v.shape[3]
    paged = x.block_table is not None
    capacity = k.shape[2] * (x.block_table.shape[1] if paged else 1)
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
    key = key_of("decode", as_operands, (q, k, v, x.block_table))
    plan = plans.get(key)
    if plan is None:
        pages = (k.shape[0], k.shape[2], x.block_table.shape[1]) if paged else (0, capacity, 0)
        plan = remember(key, _DecodePlan(as_operands, capacity, pages, key[0]))
    splits, numbers = plan.splits, plan.numbers
    parts: tuple[Tensor | None, ...] = (None, None, None)
    if splits > 1:
        shapes = ((B, H, L, splits, DV), (B, H, L, splits), (B, H, L, splits))
        parts = tuple(torch.empty(s, dtype=torch.float32, device=q.device) for s in shapes)
    table = None if x.block_table is None else x.block_table.contiguous()
    to, masks = view(out), mask_of(as_operands, None)
    args = (view(q), view(k), view(v), to, lse, (*parts, table), masks, numbers, plan.sizes)
    plan.entry(plan.grid, args, q.device.index)
    if splits > 1:
        plan.combine(B * H * L, (to, lse, *parts, numbers, splits), q.device.index)
    return out, lse


class _DecodePlan:
    """The kernels of one kind of decoding step, and in how many parts they split the keys."""

    def __init__(self, x: Operands, capacity: int, pages: tuple[int, int, int], direct: bool) -> None:
        (B, H, L, _), Hk = x.q.shape, x.k.shape[1]
        tiles = Tiles(flags_of(x, x.q, x.k, x.v), x.q, direct)
        tile = config.tile(tiles.arch, "decode", tiles.dim, tiles.math, tiles.load)
        packed = H // Hk * L
        tile = tile._replace(rows=min(64, max(tile.rows, power_of_two(packed))))
        blocks = ceil(packed, tile.rows)
        wanted = ceil(2 * config.processors(tiles.device), blocks * Hk * B)
        self.splits = max(1, min(wanted, ceil(capacity, 4 * tile.keys), config.MOST_SPLITS))
        self.grid = self.splits * blocks * Hk * B
        self.numbers = numbers_of(x, H // Hk, capacity)
        self.sizes = tuple(map(odd, (self.splits, blocks, *pages)))
        self.entry = tiles.with_tile(tile, attn_decode, tiles.flags, PAGED=pages[2] > 0)
        self.combine = tiles.with_tile(
            config.Tile(0, 0, 4, 1), attn_combine, tiles.flags, SPLITS=max(2, power_of_two(self.splits, 2))
        )
