// From products to scores: scale, soft cap, ALiBi, bias, mask, in this order and in natural units, as
// attn/reference.py defines them; written once for forward, weights, backward and decoding.
#pragma once
#include "dense.cuh"
#include "dropout.cuh"

namespace attn::cuda {

constexpr float kLog2eFloat = static_cast<float>(kLog2e);

// What a kernel is compiled for. Each is behind a branch that all threads take alike.
enum Features : unsigned {
  kBandOnly = 0,  // lengths and band: scores stay products, in units of `Call::unit`
  kCapAndAlibi = 1,
  kDenseParts = 2,
  kDocuments = 4,  // and prefixes
  kDropout = 8,
  kEverything = 15,
};

// tanh with an error of an ulp of 1, which is what a score can tell.
ATTN_DEV float tanh_of(float x) { return 1.f - 2.f * rcp(1.f + ex2(x * (2.f * kLog2eFloat))); }

// What comes on top of a product, for one head of one sequence.
struct Extras {
  float scale, softcap, uncap, slope;
  int shift;  // ALiBi: |i + shift - j|
  bool alibi;

  ATTN_DEV Extras(float scale_, float softcap_, float uncap_, const float* slopes, int64_t at, int shift_)
      : scale(scale_), softcap(softcap_), uncap(uncap_), shift(shift_), alibi(slopes != nullptr) {
    slope = alibi ? ldg(slopes + at) : 0.f;
  }
  ATTN_DEV Extras(const Call& c, const Sequence& s, int head)
      : Extras(c.scale, c.softcap, c.uncap, c.p.alibi_slopes, s.number * c.p.Hq + head, s.keys - s.queries) {}

  // The score without bias and mask; d_cap becomes the derivative of the soft cap.
  ATTN_DEV float score(float product, int i, int j, float& d_cap) const {
    float x = product * scale;
    d_cap = 1.f;
    if (softcap > 0.f) {
      const float t = tanh_of(x * uncap);
      x = softcap * t;
      d_cap = 1.f - t * t;
    }
    if (alibi) {
      const int distance = i + shift - j;
      x -= slope * static_cast<float>(distance < 0 ? -distance : distance);
    }
    return x;
  }
};

// Adds a staged bias, and hides what the staged mask hides.
ATTN_DEV float with_dense(float x, uint32_t staged) {
  return staged == kHidden ? -INFINITY : x + bit_cast<float>(staged);
}

// -infinity where lengths of keys and band hide, in an accumulator whose columns are keys from k0 on.
// position(m, half): the query of row row_of(m, 2 * half).
template <int kM, int kN, class Position>
ATTN_DEV void hide_band(const Mask& mask, const Position& position, int k0, float (&s)[kM][kN][4]) {
  ATTN_UNROLL
  for (int m = 0; m < kM; ++m) ATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    // As places in the accumulator: one subtraction per row instead of one per score.
    const int i = position(m, half), at = k0 + col_of(0, 0);
    const int low = i + mask.low - at, high = least(i + mask.high, mask.keys - 1) - at;
    ATTN_UNROLL
    for (int n = 0; n < kN; ++n) ATTN_UNROLL
    for (int x = 0; x < 2; ++x)
      if (n * 8 + x < low || n * 8 + x > high) s[m][n][2 * half + x] = -INFINITY;
  }
}

// Likewise where the queries are those from q0 on.
template <int kM, int kN>
ATTN_DEV void hide_band(const Mask& mask, int q0, int k0, float (&s)[kM][kN][4]) {
  hide_band(mask, [&](int m, int half) { return q0 + row_of(m, 2 * half); }, k0, s);
}

// Likewise by prefix and documents too. kTransposed: the rows of the accumulator are keys.
template <bool kTransposed, int kM, int kN>
ATTN_DEV void hide_all(const Mask& mask, int q0, int k0, float (&s)[kM][kN][4]) {
  ATTN_UNROLL
  for (int n = 0; n < kN; ++n) ATTN_UNROLL
  for (int x = 0; x < 2; ++x) {
    const int64_t* of_rows = kTransposed ? mask.ids_k : mask.ids_q;
    const int64_t* of_cols = kTransposed ? mask.ids_q : mask.ids_k;
    const int rows = kTransposed ? mask.keys : mask.queries, cols = kTransposed ? mask.queries : mask.keys;
    const int col = (kTransposed ? q0 : k0) + col_of(n, x);
    const int64_t id = of_cols && col < cols ? ldg(of_cols + col) : 0;
    ATTN_UNROLL
    for (int m = 0; m < kM; ++m) ATTN_UNROLL
    for (int e = x; e < 4; e += 2) {
      const int row = (kTransposed ? k0 : q0) + row_of(m, e);
      bool seen = kTransposed ? mask.near_or_prefix(col, row) : mask.near_or_prefix(row, col);
      if (of_rows && row < rows) seen = seen && ldg(of_rows + row) == id;
      if (!seen) s[m][n][e] = -INFINITY;
    }
  }
}

struct NoCap {
  ATTN_DEV void operator()(int, int, int, float) const {}
};

// The scores of a warp's accumulator of products. `partial`: whether the tile hides anything by band, lengths
// or documents. `piece`: room in shared memory for a Staged<kM * 16, kN * 8> of this warp. kTransposed: the
// rows of the accumulator are keys, and `dense` is transposed too. on_cap(m, n, e, derivative of the soft
// cap).
template <unsigned kFeatures, bool kTransposed = false, int kM, int kN, class OnCap = NoCap>
ATTN_DEV void finish_scores(const Extras& extras, const DensePart& dense, const Mask& mask, bool partial,
                            int q0, int k0, uint32_t piece, float (&s)[kM][kN][4],
                            const OnCap& on_cap = OnCap()) {
  const auto hide_by_band = [&] {
    if constexpr (kTransposed)
      hide_band(mask.mirrored(), k0, q0, s);
    else
      hide_band(mask, q0, k0, s);
  };
  if constexpr (kFeatures == kBandOnly) {
    if (partial) hide_by_band();
  } else {
    using Piece = Staged<kM * 16, kN * 8>;
    bool staged = false;
    if constexpr ((kFeatures & kDenseParts) != 0) {
      staged = dense.any();
      if (staged) {
        sync_warp();
        if constexpr (kTransposed)
          dense.template stage_piece<Piece>(piece, k0, mask.keys, q0, mask.queries);
        else
          dense.template stage_piece<Piece>(piece, q0, mask.queries, k0, mask.keys);
        sync_warp();
      }
    }
    ATTN_UNROLL
    for (int m = 0; m < kM; ++m) ATTN_UNROLL
    for (int n = 0; n < kN; ++n) ATTN_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int i = q0 + (kTransposed ? col_of(n, e) : row_of(m, e));
      const int j = k0 + (kTransposed ? row_of(m, e) : col_of(n, e));
      float d_cap;
      s[m][n][e] = extras.score(s[m][n][e], i, j, d_cap);
      on_cap(m, n, e, d_cap);
    }
    if (staged) {
      ATTN_UNROLL
      for (int m = 0; m < kM; ++m) ATTN_UNROLL
      for (int n = 0; n < kN; ++n) ATTN_UNROLL
      for (int e = 0; e < 4; e += 2) {
        const u32x2 two = lds<u32x2>(Piece::at(piece, row_of(m, e), col_of(n, 0)));
        s[m][n][e] = with_dense(s[m][n][e], two.x);
        s[m][n][e + 1] = with_dense(s[m][n][e + 1], two.y);
      }
    }
    if (partial) {
      if constexpr ((kFeatures & kDocuments) != 0)
        hide_all<kTransposed>(mask, q0, k0, s);
      else
        hide_by_band();
    }
  }
}

}  // namespace attn::cuda
