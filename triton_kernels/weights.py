"""Attention weights from the residuals, written once: averaged over heads in registers, or per head."""

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
    place,
    program,
    row_offset,
    scores,
    statistics,
    touches,
    unit,
)


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["blocks"])
def attn_weights(q, k, m_in, l_in, w, mask, n, blocks, F: tl.constexpr, AVERAGE: tl.constexpr, T: tl.constexpr):
    """w[b, h, i, j] = P after dropout; with AVERAGE its mean over heads, summed in a fixed order."""
    BM: tl.constexpr = T.rows
    BN: tl.constexpr = T.keys
    n = received(n)
    q, k = aligned(q, F), aligned(k, F)
    blk, first, b = program(blocks, 1 if AVERAGE else n.heads, False)
    at = place(mask, n, b, F)
    columns = tl.cdiv(n.keys, BN)
    i0, j0 = blk // columns * BM, blk % columns * BN
    i, j = i0 + tl.arange(0, BM), j0 + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    count = 0
    if touches(i0, j0, at, F, BM, BN):
        count = n.heads if AVERAGE else 1
    for step in tl.range(0, count, num_stages=T.stages):
        h = first + step
        query = load_rows(matrix(q, at.batch, h, at.row0), q.row, i0, at.rows, F.D, BM, F.BD)
        key = load_rows(matrix(k, at.batch, h // n.group, at.key0), k.row, j0, at.keys, F.D, BN, F.BD)
        s, _ = scores(query, key, i[:, None], j[None, :], h, True, at, mask, n, F)
        rows = row_offset(n, at, h) + i
        m = tl.load(m_in + rows, mask=i < at.rows, other=0.0)
        l = tl.load(l_in + rows, mask=i < at.rows, other=0.0)
        m, r = statistics(m, l, F)
        p = tl.where(s == -INF, 0.0, exponent(s, m[:, None], r[:, None], unit(n, F), F))  # in a row of NaN too
        if F.DROPOUT:
            p = tl.where(kept(mask, n, at, h, i0, j0, BM, BN, False), p, 0.0)
        acc += p
    to = w.ptr + at.batch * w.batch + tl.cast(first, tl.int64) * w.head
    to += i[:, None].to(tl.int64) * w.row + j[None, :] * w.col
    x = acc * (n.share * n.inv_keep)
    tl.store(to, x.to(w.ptr.dtype.element_ty), mask=(i[:, None] < n.rows) & (j[None, :] < n.keys))
