"""What one tile of scores means: lengths, masks, scores and their derivative, softmax, dropout; for every kernel.

`i` and `j` are index tensors that broadcast to the tile: (BM, 1) and (1, BN), or (1, BM) and (BN, 1) for a transposed
tile. Positions are those inside the sequence; `Place` says where the sequence lies. The meaning is that of
`attn/reference.py`; the bits of dropout are those of `attn/rng.py`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .call import Rows

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


class Place(NamedTuple):
    """One sequence: where its rows and keys begin and end, and what its band is: j - i in [lo, hi], or j < prefix."""

    seq: Any
    batch: Any  # 0 in packed calls
    row0: Any
    key0: Any
    rows: Any
    keys: Any
    stored: Any  # rows that are written: those past query_lengths too
    lo: Any
    hi: Any
    prefix: Any


class Span(NamedTuple):
    """Blocks to visit: [lo, hi) without the `gap` that begins at `gap_at`; no mask code in [full_lo, full_hi)."""

    lo: Any
    hi: Any
    full_lo: Any
    full_hi: Any
    gap_at: Any
    gap: Any
    doc_lo: Any
    doc_hi: Any


@triton.jit
def zeros(ROWS: tl.constexpr, COLS: tl.constexpr):
    """An accumulator. (Triton 3.6 takes no attribute of a constant in a shape, but an argument.)"""
    return tl.zeros([ROWS, COLS], tl.float32)


@triton.jit
def program(blocks, heads, REVERSED: tl.constexpr):
    """(block, head, sequence) of this program. REVERSED takes the longest rows of a causal mask first."""
    pid = tl.program_id(0)
    blk = pid % blocks
    if REVERSED:
        blk = blocks - 1 - blk
    return blk, pid // blocks % heads, tl.cast(pid // blocks // heads, tl.int64)


@triton.jit
def clamp(x, lo, hi):
    """Hostile lengths end inside the tensors."""
    return tl.minimum(tl.maximum(x, lo), hi)


@triton.jit
def place(mask, n, b, F: tl.constexpr):
    """The `Place` of sequence b."""
    batch = b
    row0, key0, rows, keys, prefix = 0, 0, n.rows, n.keys, 0
    if F.VARLEN:
        batch = b * 0
        row0 = clamp(tl.load(mask.cu_q + b), 0, n.rows)
        key0 = clamp(tl.load(mask.cu_k + b), 0, n.keys)
        rows = clamp(tl.load(mask.cu_q + b + 1), row0, n.rows) - row0
        keys = clamp(tl.load(mask.cu_k + b + 1), key0, n.keys) - key0
    stored = rows
    if F.QUERY_LENGTHS:
        rows = clamp(tl.load(mask.query_lengths + b), 0, n.rows)
    if F.KEY_LENGTHS:
        keys = clamp(tl.load(mask.key_lengths + b), 0, n.keys)
    if F.PREFIX:
        prefix = clamp(tl.load(mask.prefix + b), 0, keys)
    lo, hi = -n.left, n.right
    if F.END:
        lo += keys - rows
        hi += keys - rows
    return Place(b, batch, row0, key0, rows, keys, stored, lo, hi, prefix)


@triton.jit
def span(x0, at, table, F: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr, KEYS: tl.constexpr):
    """Key blocks that the rows [x0, x0 + BX) must visit; with KEYS, row blocks that these keys must visit.

    `table` points to the four numbers of this block that the host found for document masks."""
    size, end, lo_off, hi_off = at.rows, at.keys, at.lo, at.hi
    if KEYS:
        size, end, lo_off, hi_off = at.keys, at.rows, -at.hi, -at.lo
    lo, hi, full_lo, full_hi = 0, end, 0, end // BY * BY
    gap_at, gap, doc_lo, doc_hi = 0, 0, 0, 0
    if KEYS:
        full_hi = end + BY  # rows past the end are dead by their statistics
    if F.BAND:
        x1 = tl.minimum(x0 + BX, size)
        lo = tl.maximum(x0 + lo_off, 0) // BY * BY
        hi = tl.minimum(x1 + hi_off, end)
        full_lo = (tl.maximum(x1 - 1 + lo_off, 0) + BY - 1) // BY * BY
        cut = x0 + hi_off + 1
        if KEYS:
            full_hi = tl.where(cut >= end, full_hi, cut // BY * BY)
        else:
            full_hi = tl.minimum(cut, end) // BY * BY
        if F.PREFIX and KEYS:
            lo = tl.where(x0 < at.prefix, 0, lo)
            hi = tl.where(x0 < at.prefix, end, hi)
        elif F.PREFIX:
            gap_at = (at.prefix + BY - 1) // BY * BY
            hi = tl.where(hi > lo, hi, 0)
            if not F.DOCUMENTS:
                gap = tl.where(hi > 0, tl.maximum(lo - gap_at, 0), 0)
            lo = lo * 0
            hi = tl.maximum(hi, at.prefix) - gap
    if F.DOCUMENTS:
        lo = tl.maximum(lo, tl.load(table))
        doc_lo, doc_hi = tl.load(table + 1), tl.load(table + 2)
        hi = tl.minimum(hi, tl.load(table + 3))
    hi = tl.where(x0 < size, hi, lo)
    return Span(lo, hi, full_lo, full_hi, gap_at, gap, doc_lo, doc_hi)


@triton.jit
def needs_mask(x0, y0, r, at, F: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr, KEYS: tl.constexpr):
    """Whether the block at y0 of the span `r` of [x0, x0 + BX) hides anything."""
    edge = (y0 < r.full_lo) | (y0 + BY > r.full_hi)
    if F.PREFIX:
        last = y0 + BY
        if KEYS:
            last = x0 + BX
        edge = edge & (last > at.prefix)
    if F.DOCUMENTS:
        edge = edge | (y0 < r.doc_lo) | (y0 + BY > r.doc_hi)
    return edge


@triton.jit
def touches(i0, j0, at, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Whether lengths and band leave anything of the tile visible."""
    near = (i0 < at.rows) & (j0 < at.keys)
    if F.BAND:
        close = (j0 + BN > i0 + at.lo) & (j0 < i0 + BM + at.hi)
        if F.PREFIX:
            close = close | (j0 < at.prefix)
        near = near & close
    return near


@triton.jit
def hide(s, i, j, at, mask, n, F: tl.constexpr):
    """-inf where band, lengths or documents hide."""
    # Unsigned: a signed comparison is rewritten to one of values kept in registers for the whole loop.
    ok = tl.cast(j, tl.uint32) < tl.cast(at.keys, tl.uint32)
    if F.BAND:
        near = (j >= i + at.lo) & (j <= i + at.hi)
        if F.PREFIX:
            near = near | (j < at.prefix)
        ok = ok & near
    if F.DOCUMENTS:
        mine = tl.load(mask.ids_q + at.batch * n.rows + i, mask=i < at.rows, other=0)
        ok = ok & (mine == tl.load(mask.ids_k + at.batch * n.keys + j, mask=j < at.keys, other=0))
    return tl.where(ok, s, -INF)


@triton.jit
def load_dense(x, i, j, at, h):
    """A tile of a dense mask, bias or gradient of weights; 0 outside the sequence."""
    p = x.ptr + at.batch * x.batch + tl.cast(h, tl.int64) * x.head
    return tl.load(p + i.to(tl.int64) * x.row + j.to(tl.int64) * x.col, mask=(i < at.rows) & (j < at.keys), other=0)


@triton.jit
def scores(a, b, i, j, h, edge, at, mask, n, F: tl.constexpr):
    """(a.bT as final scores, derivative of the softcap). `edge` runs the mask code.

    With FOLDED the scores are still without their scale: `unit` has it."""
    s = tl.dot(a, b.T, input_precision=F.PRECISION)
    d_cap = 1.0
    if not F.FOLDED:
        s = s * n.scale
    if F.SOFTCAP:
        t = 1.0 - 2.0 / (1.0 + tl.math.exp2(s * (2.0 * LOG2E / n.cap)))  # tanh
        d_cap = 1.0 - t * t
        s = n.cap * t
    if F.ALIBI:
        slope = tl.load(mask.slopes + at.seq * n.heads + h)
        s = s - slope * tl.abs(i + (at.keys - at.rows) - j).to(tl.float32)
    if F.BIAS:
        s = s + load_dense(mask.bias, i, j, at, h).to(tl.float32)
    if F.KEEP:
        s = tl.where(load_dense(mask.keep, i, j, at, h) != 0, s, -INF)
    if edge:
        s = hide(s, i, j, at, mask, n, F)
    return s, d_cap


@triton.jit
def unit(n, F: tl.constexpr):
    """What one unit of a score is, in powers of two."""
    if F.FOLDED:
        return n.scale * LOG2E
    else:
        return LOG2E


@triton.jit
def exponent(s, m, r, c, F: tl.constexpr):
    """2^(c (s - m) - r). In 16 bits `m` is folded into `r` beforehand: one multiply-add. EXACT subtracts first: scores
    near each other lose nothing, and a bias may hold masks of -finfo.max, where m * c would be -inf."""
    if F.EXACT:
        return tl.math.exp2((s - m) * c - r)
    else:
        return tl.math.exp2(s * c - r)


@triton.jit
def online(s, m, l, acc, c, F: tl.constexpr):
    """One step of the online softmax: p, and m, l, acc brought to the new maximum."""
    top = tl.maximum(m, tl.max(s, 1))
    safe = tl.where(top == -INF, 0.0, top)
    r = tl.zeros_like(safe)
    if not F.EXACT:
        r = safe * c
    p = exponent(s, safe[:, None], r[:, None], c, F)
    shrink = exponent(m, safe, r, c, F)
    return p, top, l * shrink + tl.sum(p, 1), acc * shrink[:, None]


@triton.jit
def statistics(m, l, F: tl.constexpr):
    """(m, r) such that `exponent` gives the probability; a dead row has r = inf and so P = 0."""
    r = tl.math.log2(tl.where(l == 0.0, 1.0, l))
    m = tl.where(m == -INF, 0.0, m)
    if not F.EXACT:
        r += m * LOG2E
    return m, tl.where(l == 0.0, INF, r)


@triton.jit
def kept(mask, n, at, h, i0, j0, ROWS: tl.constexpr, COLS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which elements of the tile at (i0, j0) dropout keeps. ROWS and COLS are those of the (transposed) tile.

    One Philox call serves (i, j), (i, j + 8), (i + 8, j), (i + 8, j + 8): one thread holds those four both in a
    tensor-core accumulator and in its transpose, so no bits travel between threads."""
    seed = tl.load(mask.rng)
    offset = tl.load(mask.rng + 1).to(tl.int32)
    x = tl.arange(0, ROWS // 2)
    y = tl.arange(0, COLS // 2)
    bh = tl.cast(at.seq * n.heads + h, tl.int32)
    x = x // 8 * 16 + x % 8
    y = y // 8 * 16 + y % 8
    if TRANSPOSED:
        w00, w10, w01, w11 = tl.philox(seed, (i0 + y)[None, :], (j0 + x)[:, None], bh, offset, 7)
    else:
        w00, w01, w10, w11 = tl.philox(seed, (i0 + x)[:, None], (j0 + y)[None, :], bh, offset, 7)
    t = n.threshold
    both = tl.join(tl.join(w00 >= t, w10 >= t), tl.join(w01 >= t, w11 >= t))  # x, y, bit 3 of the row, of the column
    both = tl.reshape(both, [ROWS // 16, 8, COLS // 16, 8, 2, 2])
    return tl.reshape(tl.permute(both, [0, 4, 1, 2, 5, 3]), [ROWS, COLS])


@triton.jit
def score_gradient(p, dp, delta, keep, i, j, h, at, mask, n, F: tl.constexpr):
    """dS = P (dP - delta), with dP the gradient of the probability before dropout."""
    if F.D_WEIGHTS:
        dp += load_dense(mask.d_weights, i, j, at, h).to(tl.float32) * n.share
    if F.DROPOUT:
        dp = tl.where(keep, dp * n.inv_keep, 0.0)
    return p * (dp - delta)


@triton.jit
def aligned(x, F: tl.constexpr):
    """x, with strides that show the compiler what divides them: without, it would load element by element."""
    if F.ALIGN > 1:
        head, row = x.head // F.ALIGN * F.ALIGN, x.row // F.ALIGN * F.ALIGN
        return Rows(x.ptr, x.batch // F.ALIGN * F.ALIGN, head, row)
    else:
        return x


@triton.jit
def matrix(x, batch, head, row0):
    """Where the rows of one head begin."""
    return x.ptr + batch * x.batch + tl.cast(head, tl.int64) * x.head + tl.cast(row0, tl.int64) * x.row


@triton.jit
def stream(p, row, end, F: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr):
    """What `load_rows` reads blocks from: a tensor descriptor where the strides allow one, else the pointer."""
    if F.TMA:
        return tl.make_tensor_descriptor(p, shape=[tl.maximum(end, 1), DIM], strides=[row, 1], block_shape=[BLOCK, BD])
    else:
        return p


@triton.jit
def load_rows(p, row, start, end, DIM: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr = False):
    """(BLOCK, BD) from row `start`; zero past `end` and past column DIM."""
    if TMA:
        return p.load([start, 0])
    else:
        r, c = tl.arange(0, BLOCK), tl.arange(0, BD)
        p += tl.cast(start, tl.int64) * row + r[:, None] * row + c[None, :]
        ok = (start + r)[:, None] < end
        if DIM != BD:
            ok = ok & (c[None, :] < DIM)
        return tl.load(p, mask=ok, other=0.0)


@triton.jit
def store_rows(p, x, row, start, end, DIM: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr):
    """The counterpart of `load_rows`."""
    r, c = tl.arange(0, BLOCK), tl.arange(0, BD)
    to = p + tl.cast(start, tl.int64) * row + r[:, None] * row + c[None, :]
    tl.store(to, x.to(p.dtype.element_ty), mask=((start + r)[:, None] < end) & (c[None, :] < DIM))


@triton.jit
def row_offset(n, at, h):
    """Of a head's rows in a contiguous (batch, head, row) tensor."""
    return (at.batch * n.heads + h) * n.rows + at.row0


@triton.jit
def padded_offset(n, at, h, F: tl.constexpr):
    """Likewise where each head has n.padded rows and each packed sequence begins at a multiple of 128 of them."""
    if F.VARLEN:
        return tl.cast(h, tl.int64) * n.padded + (at.row0 + at.seq * 128) // 128 * 128
    else:
        return (at.batch * n.heads + h) * n.padded
