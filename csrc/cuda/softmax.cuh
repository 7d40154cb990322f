// The online softmax of a warp's rows, in powers of two, and probabilities from what forward left.
#pragma once
#include "scores.cuh"

namespace attn::cuda {

// A row's shift moves only where its maximum has grown by more than a factor of 2^this: what is left for
// backward stays within 8 ln 2 of the maximum, and most tiles rescale nothing.
constexpr float kSlack = 7.9f;

// How a score x with shift m becomes 2^(unit (x - m)). Folded, one multiply-add serves; exact, near scores
// lose nothing to their common size, and a bias may hold finfo.min, where unit * m would be infinite.
template <bool kExact>
struct Exponent {
  float unit;

  // What `of` takes, of a shift; that of a row that has seen nothing is 0.
  ATTN_DEV float shift(float m) const { return m == -INFINITY ? 0.f : kExact ? m : m * unit; }
  ATTN_DEV float of(float x, float shift) const {
    return ex2(kExact ? (x - shift) * unit : x * unit - shift);
  }
};

// The maximum or the sum over the four lanes that share a row.
ATTN_DEV float maximum_of_row(float x) {
  x = fmaxf(x, shfl_xor(x, 1));
  return fmaxf(x, shfl_xor(x, 2));
}
ATTN_DEV float sum_of_row(float x) {
  x += shfl_xor(x, 1);
  return x + shfl_xor(x, 2);
}

// Of kM times 16 rows; [m][half] are rows row_of(m, 2 * half).
template <int kM>
struct RowSums {
  float m[kM][2], l[kM][2];  // l: this lane's part

  ATTN_DEV void reset() {
    ATTN_UNROLL
    for (int i = 0; i < kM; ++i) ATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      m[i][half] = -INFINITY;
      l[i][half] = 0.f;
    }
  }

  // Takes in a tile of scores, which become 2^(unit (s - m)); older sums of `out` shrink where m moves. A NaN
  // is passed over by the maximum and reaches the sum.
  template <bool kExact, int kN, int kD>
  ATTN_DEV void take(const Exponent<kExact>& exponent, float (&s)[kM][kN][4], float (&out)[kM][kD][4]) {
    float top[kM][2];
    bool moved = false;
    ATTN_UNROLL
    for (int i = 0; i < kM; ++i) ATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      float x = -INFINITY;
      ATTN_UNROLL
      for (int n = 0; n < kN; ++n) x = fmaxf(x, fmaxf(s[i][n][2 * half], s[i][n][2 * half + 1]));
      top[i][half] = maximum_of_row(x);
      moved = moved || (top[i][half] - m[i][half]) * exponent.unit > kSlack;
    }
    if (vote_any(moved)) {
      ATTN_UNROLL
      for (int i = 0; i < kM; ++i) ATTN_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float now = fmaxf(top[i][half], m[i][half]), before = m[i][half];
        const float shrink = before == -INFINITY ? 0.f : exponent.of(before, exponent.shift(now));
        m[i][half] = now;
        l[i][half] *= shrink;
        ATTN_UNROLL
        for (int d = 0; d < kD; ++d) {
          out[i][d][2 * half] *= shrink;
          out[i][d][2 * half + 1] *= shrink;
        }
      }
    }
    ATTN_UNROLL
    for (int i = 0; i < kM; ++i) ATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float shift = exponent.shift(m[i][half]);
      float total = 0.f;
      ATTN_UNROLL
      for (int n = 0; n < kN; ++n) ATTN_UNROLL
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        s[i][n][e] = exponent.of(s[i][n][e], shift);
        total += s[i][n][e];
      }
      l[i][half] += total;
    }
  }
};

// m and l of one row, as forward left them, made ready for probabilities: 2^((s - m) log2(e)) / l, 0 in dead
// rows.
struct Residual {
  float m, inverse;

  ATTN_DEV Residual(float m_, float l) : m(l == 0.f ? 0.f : m_), inverse(l == 0.f ? 0.f : 1.f / l) {}
  // Hidden scores, -infinity, give 0 whatever NaN the row holds, and so do dead rows whatever the score.
  ATTN_DEV float probability(float s) const {
    return s == -INFINITY || inverse == 0.f ? 0.f : ex2((s - m) * kLog2eFloat) * inverse;
  }
};

}  // namespace attn::cuda
