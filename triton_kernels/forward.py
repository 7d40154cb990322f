"""The forward pass: one block of queries per program, one loop over the keys that it sees."""

import triton
import triton.language as tl

from .call import received
from .tile import (
    INF,
    aligned,
    kept,
    load_rows,
    matrix,
    needs_mask,
    online,
    place,
    program,
    row_offset,
    scores,
    span,
    store_rows,
    stream,
    unit,
    zeros,
)


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["blocks"])
def attn_forward(q, k, v, out, m_out, l_out, mask, n, table, blocks, F: tl.constexpr, T: tl.constexpr):
    """out, and per row the maximum score m and the sum l of exp(s - m)."""
    BM: tl.constexpr = T.rows
    BN: tl.constexpr = T.keys
    n = received(n)
    blk, h, b = program(blocks, n.heads, F.BAND)
    at = place(mask, n, b, F)
    q, k, v, out = aligned(q, F), aligned(k, F), aligned(v, F), aligned(out, F)
    i0 = blk * BM
    i = i0 + tl.arange(0, BM)
    if F.DOCUMENTS:
        table += (b * blocks + blk) * 4
    r = span(i0, at, table, F, BM, BN, False)
    query = load_rows(matrix(q, at.batch, h, at.row0), q.row, i0, at.rows, F.D, BM, F.BD)
    keys = stream(matrix(k, at.batch, h // n.group, at.key0), k.row, at.keys, F, F.D, BN, F.BD)
    values = stream(matrix(v, at.batch, h // n.group, at.key0), v.row, at.keys, F, F.DV, BN, F.BDV)
    c = unit(n, F)
    m = tl.full([BM], -INF, tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = zeros(BM, F.BDV)
    for step in tl.range(r.lo, r.hi, BN, num_stages=T.stages):
        j0 = step
        if F.PREFIX:
            j0 = step + tl.where(step >= r.gap_at, r.gap, 0)
        j = j0 + tl.arange(0, BN)
        key = load_rows(keys, k.row, j0, at.keys, F.D, BN, F.BD, F.TMA)
        edge = needs_mask(i0, j0, r, at, F, BM, BN, False)
        s, _ = scores(query, key, i[:, None], j[None, :], h, edge, at, mask, n, F)
        p, m, l, acc = online(s, m, l, acc, c, F)
        if F.DROPOUT:
            p = tl.where(kept(mask, n, at, h, i0, j0, BM, BN, False), p, 0.0)
        value = load_rows(values, v.row, j0, at.keys, F.DV, BN, F.BDV, F.TMA)
        acc = tl.dot(p.to(value.dtype), value, acc, input_precision=F.PRECISION)

    if F.QUERY_LENGTHS:
        l = tl.where(i < at.rows, l, 0.0)
        m = tl.where(i < at.rows, m, -INF)
    dead = l == 0.0
    o = tl.where(dead[:, None], 0.0, acc * (n.inv_keep / tl.where(dead, 1.0, l))[:, None])
    store_rows(matrix(out, at.batch, h, at.row0), o, out.row, i0, at.stored, F.DV, BM, F.BDV)
    if F.FOLDED:
        m = m * n.scale
    to = row_offset(n, at, h) + i
    tl.store(m_out + to, m, mask=i < at.stored)
    tl.store(l_out + to, l, mask=i < at.stored)
