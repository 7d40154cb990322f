// The passes of backward that keep no rows of queries or keys: delta where it comes from the scores, and the
// gradient of a bias. Their products go over the head dims in chunks, so that one kernel serves every
// head_dim.
#pragma once
#include "gradient.cuh"
#include "softmax.cuh"

namespace attn::cuda {

// S and dP of 64 queries by 64 keys.
template <class T>
struct ChunkedTile {
  static constexpr int kRows = 64, kWarps = 4, kThreads = kWarps * 32, kN = kRows / 8;
  using Chunk = Tile<T, kRows, 128 / static_cast<int>(sizeof(T))>;
  using Piece = Staged<16, kRows>;
  static constexpr int kPieces = 2 * Chunk::kBytes, kSmem = kPieces + kWarps * Piece::kBytes;
  using Products = float[1][kN][4];

  ATTN_DEV static int row() { return static_cast<int>(tid() / 32) * 16; }
  ATTN_DEV static uint32_t piece() { return smem_base() + kPieces + tid() / 32 * Piece::kBytes; }

  struct Side {
    GlobalRows rows;
    int first, end, access;
  };

  // acc := a b^T of rows that are `width` bytes wide.
  ATTN_DEV static void multiply(Products& acc, Side a, Side b, int width) {
    const uint32_t of_a = smem_base(), of_b = of_a + Chunk::kBytes;
    clear(acc);
    ATTN_NO_UNROLL
    for (int at = 0; at < width; at += Chunk::kRowBytes) {
      sync_threads();
      copy_tile<Chunk, kThreads>(of_a, a.rows, a.first, a.end, width - at, a.access);
      copy_tile<Chunk, kThreads>(of_b, b.rows, b.first, b.end, width - at, b.access);
      cp_async_commit();
      cp_async_wait<0>();
      sync_threads();
      multiply_rows<Chunk, Chunk>(acc, of_a, row(), of_b, 0);
      a.rows.base += Chunk::kRowBytes;
      b.rows.base += Chunk::kRowBytes;
    }
  }
  ATTN_DEV static void scores(Products& acc, const Call& c, const Sequence& s, int head, int q0, int k0) {
    const Problem& p = c.p;
    const int kv_head = head / static_cast<int>(p.Hq / p.Hkv), width = static_cast<int>(p.D * sizeof(T));
    multiply(acc, {global_rows<T>(p.q, s.batch, head, s.q_first), q0, s.queries, c.q_access},
             {global_rows<T>(p.k, s.batch, kv_head, s.k_first), k0, s.keys, c.k_access}, width);
  }
  ATTN_DEV static void gradients(Products& acc, const Call& c, const Rows& d_out, int d_out_access,
                                 const Sequence& s, int head, int q0, int k0) {
    const Problem& p = c.p;
    const int kv_head = head / static_cast<int>(p.Hq / p.Hkv), width = static_cast<int>(p.Dv * sizeof(T));
    multiply(acc, {global_rows<T>(d_out, s.batch, head, s.q_first), q0, s.queries, d_out_access},
             {global_rows<T>(p.v, s.batch, kv_head, s.k_first), k0, s.keys, c.v_access}, width);
  }
};

// delta from the scores: to := delta + rowsum(P dP). dP is that of the returned weights alone, or, `whole`,
// all of it.
template <class T>
struct BackwardDelta {
  using Of = ChunkedTile<T>;
  struct Params {
    Call c;
    Backward b;
    RowStatistics rows;
    float* to;
    int d_out_access;
    bool whole;
  };
  static constexpr int kThreads = Of::kThreads, kSmem = Of::kSmem, kMinBlocks = 2;

  ATTN_DEV static void run(const Params& x) {
    const QueryTile<Of::kRows> t(x.c, static_cast<int>(bid_x()));
    const Sequence& s = t.s;
    if (!t.exists || t.q0 >= s.queries) return;
    const Mask mask(x.c, s);
    const KeyTiles<Of::kRows, true> tiles(mask, t.q0, Of::kRows, 0, s.keys);
    const int64_t first = x.rows.first(x.c.p, s, t.head);
    const int q0 = t.q0 + Of::row();
    OwnRows<1> rows(x.rows, first, q0, t.q0 + Of::kRows);
    float total[2];
    ATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      total[half] = rows.value[kDelta][0][half];
      rows.value[kDelta][0][half] = 0.f;
    }
    const Gradient<T, false, true> gradient(x.c, x.b, s, mask, t.head);
    for (auto tile = tiles.first(); tiles.has(tile); tile = tiles.after(tile)) {
      typename Of::Products product, dp;
      Of::scores(product, x.c, s, t.head, t.q0, tile.k0);
      clear(dp);
      if (x.whole) Of::gradients(dp, x.c, x.b.d_out, x.d_out_access, s, t.head, t.q0, tile.k0);
      gradient.template both<false>(tile.partial, q0, tile.k0, Of::piece(), rows, product, dp);
      ATTN_UNROLL
      for (int half = 0; half < 2; ++half) {
        float sum = 0.f;
        ATTN_UNROLL
        for (int n = 0; n < Of::kN; ++n) sum += dp[0][n][2 * half] + dp[0][n][2 * half + 1];
        total[half] += sum_of_row(sum);
      }
    }
    ATTN_UNROLL
    for (int half = 0; half < 2; ++half)
      if ((lane() & 3) == 0) stg(x.to + first + q0 + row_of(0, 2 * half), total[half]);
  }
};

// The dims along which a gradient is summed.
struct Over {
  bool batch, head, row, col;
};
inline Over over_of(const Problem& p, const Dense& d) {
  return {d.batch == 0 && p.B > 1, d.head == 0 && p.Hq > 1, d.row == 0 && p.L > 1, d.col == 0 && p.S > 1};
}

ATTN_DEV void store_number(const Dense& d, int64_t at, float x) {
  if (d.dtype == Dtype::f32) stg(static_cast<float*>(d.data) + at, x);
  if (d.dtype == Dtype::bf16) stg(static_cast<bf16*>(d.data) + at, from_float<bf16>(x));
  if (d.dtype == Dtype::f16) stg(static_cast<fp16*>(d.data) + at, from_float<fp16>(x));
  if (d.dtype == Dtype::f64) stg(static_cast<double*>(d.data) + at, static_cast<double>(x));
}

// dS of the scores, summed in the order of batch, head, query and key over the dims in `over`. A block owns a
// tile of the result.
template <class T>
struct BackwardBias {
  using Of = ChunkedTile<T>;
  using Plane = Staged<Of::kRows, Of::kRows>;
  struct Params {
    Call c;
    Backward b;
    RowStatistics rows;
    int d_out_access;
    Dense to;
    Over over;

    int64_t tiles_q() const { return over.row ? 1 : (c.p.L + Of::kRows - 1) / Of::kRows; }
    int64_t tiles_k() const { return over.col ? 1 : (c.p.S + Of::kRows - 1) / Of::kRows; }
    int64_t blocks() const {
      return tiles_q() * tiles_k() * (over.head ? 1 : c.p.Hq) * (over.batch ? 1 : c.p.B);
    }
  };
  static constexpr int kThreads = Of::kThreads, kMinBlocks = 2;
  static constexpr int kSmem = Of::kSmem > Plane::kBytes ? Of::kSmem : Plane::kBytes;

  // [begin, end) of one dim, `each` at a time: all of it, or the part of block number `index`, which loses
  // its digit.
  struct Range {
    int begin, end;

    ATTN_DEV Range(int64_t& index, int64_t size, int each, bool all) : begin(0), end(static_cast<int>(size)) {
      if (all) return;
      const int64_t parts = (size + each - 1) / each;
      begin = static_cast<int>(index % parts) * each;
      end = least(end, begin + each);
      index /= parts;
    }
  };

  ATTN_DEV static void run(const Params& x) {
    const Problem& p = x.c.p;
    int64_t index = bid_x();
    const Range keys(index, p.S, Of::kRows, x.over.col), queries(index, p.L, Of::kRows, x.over.row);
    const Range heads(index, p.Hq, 1, x.over.head), batch(index, p.B, 1, x.over.batch);
    typename Of::Products total;
    clear(total);
    for (int b = batch.begin; b < batch.end; ++b) {
      const Sequence s = sequence_of(p, b);
      const Mask mask(x.c, s);
      for (int head = heads.begin; head < heads.end; ++head)
        for (int q0 = queries.begin; q0 < queries.end; q0 += Of::kRows)
          for (int k0 = keys.begin; k0 < keys.end; k0 += Of::kRows) add(x, s, mask, head, q0, k0, total);
    }
    sync_threads();
    ATTN_UNROLL
    for (int n = 0; n < Of::kN; ++n) ATTN_UNROLL
    for (int e = 0; e < 4; ++e)
      sts(Plane::at(smem_base(), Of::row() + row_of(0, e), col_of(n, e)), total[0][n][e]);
    sync_threads();
    write(x, batch.begin, heads.begin, queries, keys);
  }

 private:
  ATTN_DEV static void add(const Params& x, const Sequence& s, const Mask& mask, int head, int q0, int k0,
                           typename Of::Products& total) {
    const Visible visible = mask.tile(q0, Of::kRows, k0, Of::kRows);
    if (visible == Visible::kEmpty) return;
    const int row = q0 + Of::row();
    const OwnRows<1> rows(x.rows, x.rows.first(x.c.p, s, head), row, s.queries);
    typename Of::Products product, dp;
    Of::scores(product, x.c, s, head, q0, k0);
    Of::gradients(dp, x.c, x.b.d_out, x.d_out_access, s, head, q0, k0);
    const Gradient<T, false, true> gradient(x.c, x.b, s, mask, head);
    gradient.template both<false>(visible != Visible::kFull || mask.ids_q, row, k0, Of::piece(), rows,
                                  product, dp);
    ATTN_UNROLL
    for (int n = 0; n < Of::kN; ++n) ATTN_UNROLL
    for (int e = 0; e < 4; ++e) total[0][n][e] += dp[0][n][e];
  }

  ATTN_DEV static float at(int row, int col) { return lds<float>(Plane::at(smem_base(), row, col)); }

  ATTN_DEV static void write(const Params& x, int batch, int head, const Range& queries, const Range& keys) {
    const int64_t to =
        batch * x.to.batch + head * x.to.head + queries.begin * x.to.row + keys.begin * x.to.col;
    const int high = x.over.row ? 1 : queries.end - queries.begin,
              wide = x.over.col ? 1 : keys.end - keys.begin;
    for (int i = static_cast<int>(tid()); i < high * Of::kRows; i += kThreads) {
      const int row = i / Of::kRows, col = i % Of::kRows;
      if (col >= wide) continue;
      float sum = 0.f;
      for (int r = row; r < (x.over.row ? Of::kRows : row + 1); ++r)
        for (int c = col; c < (x.over.col ? Of::kRows : col + 1); ++c) sum += at(r, c);
      store_number(x.to, to + row * x.to.row + col * x.to.col, sum);
    }
  }
};

// Sums of BackwardBias, one for each batch and head, added in this order.
struct BackwardBiasSum {
  struct Params {
    Dense from, to;
    Over over;
    int64_t B, H, L, S;  // L or S is 1 where it is summed already

    int64_t elements() const { return (over.batch ? 1 : B) * (over.head ? 1 : H) * L * S; }
  };
  static constexpr int kThreads = 128, kSmem = 0, kMinBlocks = 1;

  ATTN_DEV static void run(const Params& x) {
    int64_t index = int64_t{bid_x()} * kThreads + tid();
    const int64_t j = index % x.S, i = index / x.S % x.L;
    index /= x.S * x.L;
    const int64_t heads = x.over.head ? 1 : x.H, batches = x.over.batch ? 1 : x.B;
    const int64_t h = index % heads, b = index / heads;
    if (b >= batches) return;
    float sum = 0.f;
    for (int64_t of_b = b; of_b < (x.over.batch ? x.B : b + 1); ++of_b)
      for (int64_t of_h = h; of_h < (x.over.head ? x.H : h + 1); ++of_h)
        sum += ldg(static_cast<const float*>(x.from.data) + of_b * x.from.batch + of_h * x.from.head +
                   i * x.from.row + j * x.from.col);
    store_number(x.to, b * x.to.batch + h * x.to.head + i * x.to.row + j * x.to.col, sum);
  }
};

}  // namespace attn::cuda
