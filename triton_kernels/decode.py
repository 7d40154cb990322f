"""One decoding step: the keys of a sequence split over programs, then combined. The cache is contiguous or paged."""

import triton
import triton.language as tl

from .call import even, received
from .tile import INF, LN2, LOG2E, Place, aligned, clamp, online, scores, unit, zeros


@triton.jit
def cache_rows(cache, table, b, hk, j, live, pages, page_size, slots, PAGED: tl.constexpr):
    """Pointers to the rows j of one sequence and head; page numbers that point outside end inside."""
    head = cache.ptr + tl.cast(hk, tl.int64) * cache.head
    if PAGED:
        page = tl.load(table + b * slots + j // page_size, mask=live, other=0)
        page = tl.cast(clamp(page, 0, pages - 1), tl.int64)
        return head + page * cache.batch + (j % page_size).to(tl.int64) * cache.row
    else:
        return head + b * cache.batch + j.to(tl.int64) * cache.row


@triton.jit
def attn_decode(q, k, v, out, lse, parts, mask, n, sizes, F: tl.constexpr, PAGED: tl.constexpr, T: tl.constexpr):
    """One of `splits` parts of one sequence's keys for one key head. Row r of the tile is new token r // group of query
    head r % group: the whole group and all new tokens read the cache once. A single part writes the result itself."""
    BR: tl.constexpr = T.rows
    BN: tl.constexpr = T.keys
    n = received(n)
    q, k, v, out = aligned(q, F), aligned(k, F), aligned(v, F), aligned(out, F)
    splits, blocks = even(sizes[0]), even(sizes[1])
    pages, page_size, slots = even(sizes[2]), even(sizes[3]), even(sizes[4])
    part_acc, part_m, part_l, table = parts
    pid = tl.program_id(0)
    part = pid % splits
    blk = pid // splits % blocks
    hk = pid // splits // blocks % (n.heads // n.group)
    b = tl.cast(pid // splits // blocks // (n.heads // n.group), tl.int64)
    keys = clamp(tl.load(mask.key_lengths + b), 0, n.keys)
    off = keys - n.rows
    at = Place(b, b, 0, 0, n.rows, keys, n.rows, off - n.left, off + n.right, 0)
    lo = tl.maximum(at.lo, 0) // BN * BN
    hi = clamp(n.rows + at.hi, 0, keys)
    share = tl.cdiv(tl.cdiv(tl.maximum(hi - lo, 0), BN), splits) * BN
    lo += part * share
    hi = tl.minimum(lo + share, hi)
    rows = blk * BR + tl.arange(0, BR)
    token, head = rows // n.group, hk * n.group + rows % n.group
    d, dv = tl.arange(0, F.BD), tl.arange(0, F.BDV)
    live = token < n.rows
    to_q = tl.cast(head, tl.int64)[:, None] * q.head + tl.cast(token, tl.int64)[:, None] * q.row + d[None, :]
    query = tl.load(q.ptr + b * q.batch + to_q, mask=live[:, None] & (d < F.D)[None, :], other=0.0)
    c = unit(n, F)
    m = tl.full([BR], -INF, tl.float32)
    l = tl.zeros([BR], tl.float32)
    acc = zeros(BR, F.BDV)
    for j0 in tl.range(lo, hi, BN, num_stages=T.stages):
        j = j0 + tl.arange(0, BN)
        seen = j < hi
        key_at = cache_rows(k, table, b, hk, j, seen, pages, page_size, slots, PAGED)
        value_at = cache_rows(v, table, b, hk, j, seen, pages, page_size, slots, PAGED)
        key = tl.load(key_at[:, None] + d[None, :], mask=seen[:, None] & (d < F.D)[None, :], other=0.0)
        value = tl.load(value_at[:, None] + dv[None, :], mask=seen[:, None] & (dv < F.DV)[None, :], other=0.0)
        s, _ = scores(query, key, token[:, None], j[None, :], head[:, None], True, at, mask, n, F)
        s = tl.where(seen[None, :], s, -INF)
        p, m, l, acc = online(s, m, l, acc, c, F)
        acc = tl.dot(p.to(value.dtype), value, acc, input_precision=F.PRECISION)
    if F.FOLDED:
        m = m * n.scale
    at_row = (b * n.heads + head) * n.rows + token
    if part_acc is None:
        dead = l == 0.0
        o = tl.where(dead[:, None], 0.0, acc / tl.where(dead, 1.0, l)[:, None])
        to = out.ptr + b * out.batch + tl.cast(head, tl.int64)[:, None] * out.head
        to += tl.cast(token, tl.int64)[:, None] * out.row + dv[None, :]
        tl.store(to, o.to(out.ptr.dtype.element_ty), mask=live[:, None] & (dv < F.DV)[None, :])
        tl.store(lse + at_row, tl.where(dead, -INF, m + LN2 * tl.math.log2(tl.where(dead, 1.0, l))), mask=live)
    else:
        at_part = at_row * splits + part
        tl.store(part_m + at_part, m, mask=live)
        tl.store(part_l + at_part, l, mask=live)
        tl.store(part_acc + at_part[:, None] * F.DV + dv[None, :], acc, mask=live[:, None] & (dv < F.DV)[None, :])


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["splits"])
def attn_combine(out, lse, part_acc, part_m, part_l, n, splits, F: tl.constexpr, SPLITS: tl.constexpr):
    """Adds the parts of one row; SPLITS is a power of two >= splits."""
    n = received(n)
    row = tl.cast(tl.program_id(0), tl.int64)
    token, head, b = row % n.rows, row // n.rows % n.heads, row // n.rows // n.heads
    dv, part = tl.arange(0, F.BDV), tl.arange(0, SPLITS)
    some = part < splits
    m = tl.load(part_m + row * splits + part, mask=some, other=-INF)
    l = tl.load(part_l + row * splits + part, mask=some, other=0.0)
    top = tl.max(m, 0)
    share = tl.math.exp2((m - tl.where(top == -INF, 0.0, top)) * LOG2E)
    total = tl.sum(l * share, 0)
    at = part_acc + (row * splits + part)[:, None] * F.DV + dv[None, :]
    acc = tl.load(at, mask=some[:, None] & (dv < F.DV)[None, :], other=0.0)
    dead = total == 0.0
    o = tl.sum(acc * share[:, None], 0) / tl.where(dead, 1.0, total)
    to = out.ptr + b * out.batch + head * out.head + token * out.row + dv
    tl.store(to, tl.where(dead, 0.0, o).to(out.ptr.dtype.element_ty), mask=dv < F.DV)
    tl.store(lse + row, tl.where(dead, -INF, top + LN2 * tl.math.log2(tl.where(dead, 1.0, total))))
