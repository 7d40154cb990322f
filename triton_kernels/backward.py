"""The backward pass: row statistics, dK and dV by blocks of keys, dQ by blocks of queries. No atomics unless asked.

With P the probabilities, dP = dO.vT and delta = rowsum(P dP) - dlse: dS = P (dP - delta).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .call import received
from .tile import (
    INF,
    aligned,
    exponent,
    kept,
    load_rows,
    matrix,
    needs_mask,
    padded_offset,
    place,
    program,
    row_offset,
    score_gradient,
    scores,
    span,
    statistics,
    store_rows,
    stream,
    touches,
    unit,
    zeros,
)


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["blocks"])
def attn_delta(out, d_out, d_lse, l_in, stats, mask, n, blocks, F: tl.constexpr, T: tl.constexpr):
    """delta = rowsum(out dO) - dlse and the r of `statistics`, padded with dead rows to 128: readers need no mask."""
    BM: tl.constexpr = T.rows
    n = received(n)
    out, d_out = aligned(out, F), aligned(d_out, F)
    blk, h, b = program(blocks, n.heads, False)
    at = place(mask, n, b, F)
    i0 = blk * BM
    i = i0 + tl.arange(0, BM)
    live = i < at.rows
    if i0 < (at.stored + 127) // 128 * 128:
        o = load_rows(matrix(out, at.batch, h, at.row0), out.row, i0, at.rows, F.DV, BM, F.BDV)
        g = load_rows(matrix(d_out, at.batch, h, at.row0), d_out.row, i0, at.rows, F.DV, BM, F.BDV)
        rows = row_offset(n, at, h) + i
        m = tl.load(stats.m + rows, mask=live, other=0.0)
        l = tl.load(l_in + rows, mask=live, other=0.0)
        delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
        if d_lse is not None:
            delta -= tl.load(d_lse + rows, mask=live, other=0.0)
        _, r = statistics(m, l, F)
        to = padded_offset(n, at, h, F) + i
        tl.store(stats.r + to, r)
        tl.store(stats.delta + to, tl.where(l == 0.0, 0.0, delta))


@triton.jit
def load_statistics(stats, i, at, h, n, F: tl.constexpr):
    """(m, r, delta) of the rows i: m and r as `exponent` wants them."""
    rows = padded_offset(n, at, h, F) + i
    r = tl.load(stats.r + rows)
    m = r
    if F.EXACT:
        m = tl.load(stats.m + row_offset(n, at, h) + i, mask=i < at.rows, other=0.0)
        m = tl.where(m == -INF, 0.0, m)
    return m, r, tl.load(stats.delta + rows)


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["blocks"])
def attn_backward_keys(
    q, k, v, d_out, stats, to, mask, n, table, blocks, F: tl.constexpr, PART: tl.constexpr, T: tl.constexpr
):
    """dK and dV of one block of keys, over the query blocks of the whole group. Tiles are transposed: keys down.

    PART: "keys"; or "dk" or "dv" alone, where the registers do not hold both accumulators; or "one_pass": dQ too, added
    to a float32 buffer by atomics, in no fixed order."""
    BM: tl.constexpr = T.rows
    BN: tl.constexpr = T.keys
    n = received(n)
    q, k, v, d_out = aligned(q, F), aligned(k, F), aligned(v, F), aligned(d_out, F)
    dq, dk, dv = to
    dk, dv = aligned(dk, F), aligned(dv, F)
    blk, hk, b = program(blocks, n.heads // n.group, False)
    at = place(mask, n, b, F)
    j0 = blk * BN
    j = j0 + tl.arange(0, BN)
    if F.DOCUMENTS:
        table += (b * blocks + blk) * 4
    span_ = span(j0, at, table, F, BN, BM, True)
    key = load_rows(matrix(k, at.batch, hk, at.key0), k.row, j0, at.keys, F.D, BN, F.BD)
    value = load_rows(matrix(v, at.batch, hk, at.key0), v.row, j0, at.keys, F.DV, BN, F.BDV)
    c = unit(n, F)
    d_key = zeros(BN, F.BD)
    d_value = zeros(BN, F.BDV)
    queries = stream_group(matrix(q, at.batch, hk * n.group, at.row0), q, n, at, F, F.D, BM, F.BD)
    grads = stream_group(matrix(d_out, at.batch, hk * n.group, at.row0), d_out, n, at, F, F.DV, BM, F.BDV)
    g = 0
    i0 = span_.lo
    # All (head, block) pairs in one loop: the pipeline never drains between heads.
    for _ in tl.range(0, tl.maximum(tl.cdiv(span_.hi - span_.lo, BM), 0) * n.group, num_stages=T.stages):
        h = hk * n.group + g
        i = i0 + tl.arange(0, BM)
        query = load_group(queries, q, g, i0, at, F, F.D, BM, F.BD)
        m, r, delta = load_statistics(stats, i, at, h, n, F)
        edge = False
        if F.BAND or F.DOCUMENTS:
            edge = needs_mask(j0, i0, span_, at, F, BN, BM, True)
        s, d_cap = scores(key, query, i[None, :], j[:, None], h, edge, at, mask, n, F)
        p = exponent(s, m[None, :], r[None, :], c, F)
        do = load_group(grads, d_out, g, i0, at, F, F.DV, BM, F.BDV)
        if PART == "one_pass":  # keys past the end meet zero rows of k, and P may be inf there
            p = tl.where((j < at.keys)[:, None], p, 0.0)
        keep = True
        if F.DROPOUT:
            keep = kept(mask, n, at, h, i0, j0, BN, BM, True)
        if PART != "dv":
            dp = tl.dot(value, do.T, input_precision=F.PRECISION)
        if PART != "dk":
            dropped = p
            if F.DROPOUT:
                dropped = tl.where(keep, p, 0.0)
            d_value = tl.dot(dropped.to(do.dtype), do, d_value, input_precision=F.PRECISION)
        if PART != "dv":
            ds = score_gradient(p, dp, delta[None, :], keep, i[None, :], j[:, None], h, at, mask, n, F) * d_cap
            ds = ds.to(query.dtype)
            d_key = tl.dot(ds, query, d_key, input_precision=F.PRECISION)
            if PART == "one_pass":
                d_query = tl.dot(ds.T, key, input_precision=F.PRECISION) * n.scale
                cols = tl.arange(0, F.BD)
                to = matrix(dq, at.batch, h, at.row0) + tl.cast(i, tl.int64)[:, None] * dq.row + cols[None, :]
                tl.atomic_add(to, d_query, mask=(i < at.rows)[:, None] & (cols < F.D)[None, :], sem="relaxed")
        i0 += BM
        if i0 >= span_.hi:
            i0 = span_.lo
            g += 1
    live = (j < at.keys)[:, None]
    end = n.keys
    if F.VARLEN:
        end = at.keys
    if PART != "dv":
        d_key = tl.where(live, d_key * n.scale, 0.0)
        store_rows(matrix(dk, at.batch, hk, at.key0), d_key, dk.row, j0, end, F.D, BN, F.BD)
    if PART != "dk":
        d_value = tl.where(live, d_value * n.inv_keep, 0.0)
        store_rows(matrix(dv, at.batch, hk, at.key0), d_value, dv.row, j0, end, F.DV, BN, F.BDV)


@triton.jit
def stream_group(p, x, n, at, F: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr):
    """`stream` over the heads of a group."""
    if F.TMA:
        shape = [n.group, tl.maximum(at.rows, 1), DIM]
        return tl.make_tensor_descriptor(p, shape=shape, strides=[x.head, x.row, 1], block_shape=[1, BLOCK, BD])
    else:
        return p


@triton.jit
def load_group(p, x, g, start, at, F: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr):
    """`load_rows` of head g of a group."""
    if F.TMA:
        return tl.reshape(p.load([g, start, 0]), [BLOCK, BD])
    else:
        return load_rows(p + tl.cast(g, tl.int64) * x.head, x.row, start, at.rows, DIM, BLOCK, BD)


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["blocks"])
def attn_backward_queries(
    q, k, v, d_out, stats, dq, mask, n, table, blocks, F: tl.constexpr, DELTA: tl.constexpr, T: tl.constexpr
):
    """dQ of one block of queries. With DELTA, instead, rowsum(P dW) of returned weights, added to delta in place."""
    BM: tl.constexpr = T.rows
    BN: tl.constexpr = T.keys
    n = received(n)
    q, k, v, d_out = aligned(q, F), aligned(k, F), aligned(v, F), aligned(d_out, F)
    dq = aligned(dq, F)
    blk, h, b = program(blocks, n.heads, F.BAND)
    at = place(mask, n, b, F)
    i0 = blk * BM
    i = i0 + tl.arange(0, BM)
    if F.DOCUMENTS:
        table += (b * blocks + blk) * 4
    span_ = span(i0, at, table, F, BM, BN, False)
    query = load_rows(matrix(q, at.batch, h, at.row0), q.row, i0, at.rows, F.D, BM, F.BD)
    do = load_rows(matrix(d_out, at.batch, h, at.row0), d_out.row, i0, at.rows, F.DV, BM, F.BDV)
    keys = stream(matrix(k, at.batch, h // n.group, at.key0), k.row, at.keys, F, F.D, BN, F.BD)
    values = stream(matrix(v, at.batch, h // n.group, at.key0), v.row, at.keys, F, F.DV, BN, F.BDV)
    m, r, delta = load_statistics(stats, i, at, h, n, F)
    c = unit(n, F)
    d_query = zeros(BM, F.BD)
    total = tl.zeros([BM], tl.float32)
    for step in tl.range(span_.lo, span_.hi, BN, num_stages=T.stages):
        j0 = step
        if F.PREFIX:
            j0 = step + tl.where(step >= span_.gap_at, span_.gap, 0)
        j = j0 + tl.arange(0, BN)
        key = load_rows(keys, k.row, j0, at.keys, F.D, BN, F.BD, F.TMA)
        edge = needs_mask(i0, j0, span_, at, F, BM, BN, False)
        keep = True
        if F.DROPOUT:
            keep = kept(mask, n, at, h, i0, j0, BM, BN, False)
        if DELTA:
            s, _ = scores(query, key, i[:, None], j[None, :], h, edge, at, mask, n, F)
            p = exponent(s, m[:, None], r[:, None], c, F)
            zero = tl.zeros([BM, BN], tl.float32)
            total += tl.sum(score_gradient(p, zero, 0.0, keep, i[:, None], j[None, :], h, at, mask, n, F), 1)
        else:
            value = load_rows(values, v.row, j0, at.keys, F.DV, BN, F.BDV, F.TMA)
            s, d_cap = scores(query, key, i[:, None], j[None, :], h, edge, at, mask, n, F)
            p = exponent(s, m[:, None], r[:, None], c, F)
            dp = tl.dot(do, value.T, input_precision=F.PRECISION)
            ds = score_gradient(p, dp, delta[:, None], keep, i[:, None], j[None, :], h, at, mask, n, F) * d_cap
            d_query = tl.dot(ds.to(key.dtype), key, d_query, input_precision=F.PRECISION)
    if DELTA:
        tl.store(stats.delta + padded_offset(n, at, h, F) + i, delta + total, mask=i < at.rows)
    else:
        store_rows(matrix(dq, at.batch, h, at.row0), d_query * n.scale, dq.row, i0, at.stored, F.D, BM, F.BD)


class Stats(NamedTuple):
    """Per row: the m of forward; r and delta in rows that are padded to 128 per head and sequence."""

    m: Any
    r: Any
    delta: Any


class Over(NamedTuple):
    """The dimensions that a bias was broadcast along."""

    batch: bool
    head: bool
    row: bool
    col: bool


@triton.jit(do_not_specialize=["batches", "blocks"], do_not_specialize_on_alignment=["batches", "blocks"])
def attn_backward_bias(
    q, k, v, d_out, stats, dx, mask, n, batches, blocks, F: tl.constexpr, OVER: tl.constexpr, T: tl.constexpr
):
    """The gradient of a bias: dS summed in a fixed order over the dimensions OVER. One program per block of the sum."""
    BM: tl.constexpr = T.rows
    BN: tl.constexpr = T.keys
    n = received(n)
    q, k, v, d_out = aligned(q, F), aligned(k, F), aligned(v, F), aligned(d_out, F)
    nb = batches if OVER.batch else 1
    nh = n.heads if OVER.head else 1
    ni = tl.cdiv(n.rows, BM) if OVER.row else 1
    nj = tl.cdiv(n.keys, BN) if OVER.col else 1
    blk, h, b = program(blocks, 1 if OVER.head else n.heads, False)
    columns = 1 if OVER.col else tl.cdiv(n.keys, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for t in range(0, nb * nh * ni * nj):
        head = h + t // (ni * nj) % nh
        at = place(mask, n, b + t // (ni * nj * nh), F)
        i0 = (blk // columns + t // nj % ni) * BM
        j0 = (blk % columns + t % nj) * BN
        i = i0 + tl.arange(0, BM)
        j = j0 + tl.arange(0, BN)
        if touches(i0, j0, at, F, BM, BN):
            query = load_rows(matrix(q, at.batch, head, at.row0), q.row, i0, at.rows, F.D, BM, F.BD)
            do = load_rows(matrix(d_out, at.batch, head, at.row0), d_out.row, i0, at.rows, F.DV, BM, F.BDV)
            key = load_rows(matrix(k, at.batch, head // n.group, at.key0), k.row, j0, at.keys, F.D, BN, F.BD)
            value = load_rows(matrix(v, at.batch, head // n.group, at.key0), v.row, j0, at.keys, F.DV, BN, F.BDV)
            m, r, delta = load_statistics(stats, i, at, head, n, F)
            s, _ = scores(query, key, i[:, None], j[None, :], head, True, at, mask, n, F)
            p = exponent(s, m[:, None], r[:, None], unit(n, F), F)
            dp = tl.dot(do, value.T, input_precision=F.PRECISION)
            keep = True
            if F.DROPOUT:
                keep = kept(mask, n, at, head, i0, j0, BM, BN, False)
            acc += score_gradient(p, dp, delta[:, None], keep, i[:, None], j[None, :], head, at, mask, n, F)
    to = dx.ptr + b * dx.batch + tl.cast(h, tl.int64) * dx.head
    i = (blk // columns) * BM + tl.arange(0, BM)
    j = (blk % columns) * BN + tl.arange(0, BN)
    if OVER.row and OVER.col:
        tl.store(to, tl.sum(acc))
    elif OVER.row:
        tl.store(to + j * dx.col, tl.sum(acc, 0), mask=j < n.keys)
    elif OVER.col:
        tl.store(to + i.to(tl.int64) * dx.row, tl.sum(acc, 1), mask=i < n.rows)
    else:
        to += i[:, None].to(tl.int64) * dx.row + j[None, :] * dx.col
        tl.store(to, acc, mask=(i[:, None] < n.rows) & (j[None, :] < n.keys))
