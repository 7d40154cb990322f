// From the products of a tile, q k and d_out v, to P and dS; for every kernel of backward.
//
// dP is d_out v plus the gradient of returned weights, 0 where dropout dropped and else over 1 - p; then
// dS = P (dP - delta), and that times the derivative of the soft cap belongs to the product. Hidden pairs
// have P = 0.
#pragma once
#include "backward_rows.cuh"
#include "scores.cuh"

namespace attn::cuda {

enum Statistic { kShift, kLog, kDelta };

// The statistics of the rows of an accumulator, in registers.
template <int kM>
struct OwnRows {
  float value[3][kM][2];

  // Of queries from q0 on, of which those from `end` on are dead. `from`: their first in `all`.
  ATTN_DEV OwnRows(const RowStatistics& all, int64_t from, int q0, int end) {
    ATTN_UNROLL
    for (int m = 0; m < kM; ++m) ATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int i = q0 + row_of(m, 2 * half);
      const bool real = i < end;
      value[kShift][m][half] = real ? ldg(all.m + from + i) : 0.f;
      value[kLog][m][half] = real ? ldg(all.r + from + i) : INFINITY;
      value[kDelta][m][half] = real ? ldg(all.delta + from + i) : 0.f;
    }
  }
  template <Statistic kWhich>
  ATTN_DEV float of_column(int, int) const {
    return 0.f;
  }
  template <Statistic kWhich>
  ATTN_DEV float of(float, int m, int half) const {
    return value[kWhich][m][half];
  }
};

// Those of the columns of a transposed accumulator, in shared memory: three times kCount floats.
template <int kCount>
struct StagedRows {
  static constexpr int kBytes = 3 * kCount * 4;
  uint32_t base;

  // By the first threads of a block, without closing the group.
  ATTN_DEV static void copy(uint32_t to, const RowStatistics& all, int64_t from) {
    constexpr int kChunks = kCount / 4;
    const int x = static_cast<int>(tid()), which = x / kChunks;
    if (which > 2) return;
    const float* source = which == kShift ? all.m : which == kLog ? all.r : all.delta;
    cp_async_16(to + static_cast<uint32_t>(x * 16), source + from + x % kChunks * 4, 16);
  }
  template <Statistic kWhich>
  ATTN_DEV float of_column(int n, int x) const {
    return lds<float>(base + static_cast<uint32_t>((kWhich * kCount + col_of(n, x)) * 4));
  }
  template <Statistic kWhich>
  ATTN_DEV float of(float column, int, int) const {
    return column;
  }
};

// visit(m, n, e, statistic) for all elements.
template <Statistic kWhich, int kM, int kN, class RowsOf, class Visit>
ATTN_DEV void with_statistic(const RowsOf& rows, const Visit& visit) {
  ATTN_UNROLL
  for (int n = 0; n < kN; ++n) ATTN_UNROLL
  for (int x = 0; x < 2; ++x) {
    const float column = rows.template of_column<kWhich>(n, x);
    ATTN_UNROLL
    for (int m = 0; m < kM; ++m) ATTN_UNROLL
    for (int half = 0; half < 2; ++half) visit(m, n, 2 * half + x, rows.template of<kWhich>(column, m, half));
  }
}

// The factor of one head's weights in those that were returned.
ATTN_DEV float share_of(const Problem& p, const Backward& b) {
  return b.average ? 1.f / static_cast<float>(p.Hq) : 1.f;
}

// One head: products of its tiles to P and dS. kTransposed: the rows of the accumulators are keys.
template <class T, bool kTransposed, bool kHeavy>
class Gradient;

// Lengths and a band alone.
template <class T, bool kTransposed>
class Gradient<T, kTransposed, false> {
 public:
  ATTN_DEV Gradient(const Call& c, const Backward&, const Sequence&, const Mask& mask, int)
      : c_(c), mask_(mask) {}

  // s: products to P.
  template <int kM, int kN, class RowsOf>
  ATTN_DEV void probabilities(bool partial, int q0, int k0, uint32_t, const RowsOf& rows,
                              float (&s)[kM][kN][4]) const {
    if (partial) {
      if constexpr (kTransposed)
        hide_band(mask_.mirrored(), k0, q0, s);
      else
        hide_band(mask_, q0, k0, s);
    }
    if constexpr (std::is_same_v<T, float>) {
      with_statistic<kShift, kM, kN>(
          rows, [&](int m, int n, int e, float shift) { s[m][n][e] = s[m][n][e] * c_.scale - shift; });
      with_statistic<kLog, kM, kN>(
          rows, [&](int m, int n, int e, float r) { s[m][n][e] = ex2(s[m][n][e] * kLog2eFloat - r); });
    } else {
      with_statistic<kLog, kM, kN>(
          rows, [&](int m, int n, int e, float r) { s[m][n][e] = ex2(s[m][n][e] * c_.unit - r); });
    }
  }
  // And dp: to dS.
  template <int kM, int kN, class RowsOf>
  ATTN_DEV void both(bool partial, int q0, int k0, uint32_t piece, const RowsOf& rows, float (&s)[kM][kN][4],
                     float (&dp)[kM][kN][4]) const {
    probabilities(partial, q0, k0, piece, rows, s);
    with_statistic<kDelta, kM, kN>(
        rows, [&](int m, int n, int e, float delta) { dp[m][n][e] = s[m][n][e] * (dp[m][n][e] - delta); });
  }

 private:
  const Call& c_;
  const Mask& mask_;
};

// Everything.
template <class T, bool kTransposed>
class Gradient<T, kTransposed, true> {
 public:
  ATTN_DEV Gradient(const Call& c, const Backward& b, const Sequence& s, const Mask& mask, int head)
      : mask_(mask),
        extras_(c, s, head),
        dense_(c.p, s, head),
        d_weights_(Plane(b.d_weights, s, head, static_cast<int>(sizeof(T))), Plane(Dense(), s, head, 1)),
        dropout_(c, s, head),
        inverse_keep_(c.inverse_keep),
        share_(share_of(c.p, b)) {
    if constexpr (kTransposed) {
      dense_ = dense_.transposed();
      d_weights_ = d_weights_.transposed();
    }
  }

  // s: products to P, 0 where dropped.
  template <int kM, int kN, class RowsOf>
  ATTN_DEV void probabilities(bool partial, int q0, int k0, uint32_t piece, const RowsOf& rows,
                              float (&s)[kM][kN][4]) const {
    finish_scores<kEverything, kTransposed>(extras_, dense_, mask_, partial, q0, k0, piece, s);
    exponentials(rows, s);
    if (dropout_.on)
      each_kept<kM, kN, kTransposed>(dropout_, q0, k0, [&](int m, int n, int e, bool kept) {
        if (!kept) s[m][n][e] = 0.f;
      });
  }
  // And dp: to dS, of the product or, unless kCapped, of the score.
  template <bool kCapped = true, int kM, int kN, class RowsOf>
  ATTN_DEV void both(bool partial, int q0, int k0, uint32_t piece, const RowsOf& rows, float (&s)[kM][kN][4],
                     float (&dp)[kM][kN][4]) const {
    if (d_weights_.any()) add_weights(q0, k0, piece, dp);
    uint32_t dropped[(kM * kN * 4 + 31) / 32] = {};
    if (dropout_.on)
      each_kept<kM, kN, kTransposed>(dropout_, q0, k0, [&](int m, int n, int e, bool kept) {
        const int at = (m * kN + n) * 4 + e;
        if (!kept) dropped[at / 32] |= 1u << at % 32;
        dp[m][n][e] = kept ? dp[m][n][e] * inverse_keep_ : 0.f;
      });
    with_statistic<kDelta, kM, kN>(rows, [&](int m, int n, int e, float delta) { dp[m][n][e] -= delta; });
    finish_scores<kEverything, kTransposed>(extras_, dense_, mask_, partial, q0, k0, piece, s,
                                            [&](int m, int n, int e, float d_cap) {
                                              if constexpr (kCapped) dp[m][n][e] *= d_cap;
                                            });
    exponentials(rows, s);
    ATTN_UNROLL
    for (int m = 0; m < kM; ++m) ATTN_UNROLL
    for (int n = 0; n < kN; ++n) ATTN_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int at = (m * kN + n) * 4 + e;
      dp[m][n][e] *= s[m][n][e];
      if (dropped[at / 32] >> at % 32 & 1u) s[m][n][e] = 0.f;
    }
  }

 private:
  template <int kM, int kN, class RowsOf>
  ATTN_DEV void exponentials(const RowsOf& rows, float (&s)[kM][kN][4]) const {
    with_statistic<kShift, kM, kN>(
        rows, [&](int m, int n, int e, float shift) { s[m][n][e] = (s[m][n][e] - shift) * kLog2eFloat; });
    with_statistic<kLog, kM, kN>(rows,
                                 [&](int m, int n, int e, float r) { s[m][n][e] = ex2(s[m][n][e] - r); });
  }
  template <int kM, int kN>
  ATTN_DEV void add_weights(int q0, int k0, uint32_t piece, float (&dp)[kM][kN][4]) const {
    using Piece = Staged<kM * 16, kN * 8>;
    sync_warp();
    if constexpr (kTransposed)
      d_weights_.template stage_piece<Piece>(piece, k0, mask_.keys, q0, mask_.queries);
    else
      d_weights_.template stage_piece<Piece>(piece, q0, mask_.queries, k0, mask_.keys);
    sync_warp();
    ATTN_UNROLL
    for (int m = 0; m < kM; ++m) ATTN_UNROLL
    for (int n = 0; n < kN; ++n) ATTN_UNROLL
    for (int e = 0; e < 4; e += 2) {
      const u32x2 two = lds<u32x2>(Piece::at(piece, row_of(m, e), col_of(n, 0)));
      dp[m][n][e] += bit_cast<float>(two.x) * share_;
      dp[m][n][e + 1] += bit_cast<float>(two.y) * share_;
    }
  }

  const Mask& mask_;
  Extras extras_;
  DensePart dense_, d_weights_;  // the latter has no mask
  Dropout dropout_;
  float inverse_keep_, share_;
};

}  // namespace attn::cuda
