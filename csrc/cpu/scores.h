// The scores of a tile: scale * q k, soft cap, ALiBi, bias, mask, in this order and in natural units, as
// attn/reference.py defines them; written once for forward, weights and backward.
//
// A score tile is [key][query] with stride kQueries: the lanes are queries, so that softmax needs no sum
// across lanes. Its rows beyond the keys asked for are not written; columns are written up to round_up(nq,
// kWidth), and those from nq on hold anything finite or hidden.
//
// 1. Sequence(p, n), Mask(p, sequence, head), Extras(p, sequence, head)
//
// 2. once per tile of queries: pack_columns(q rows, ..., query_scale(p), packed)
//
// 3. for the tiles of mask.keys(q0, nq), from a multiple of mask.tile_keys() on: classify(mask, ..., seen),
//    which says kEmpty (next tile), kPartial or kFull (then `seen` is null in what follows)
//
// 4. score_tile(extras, left_operand(k rows, ...), ..., seen, s, d_cap or null)
#pragma once
#include "dropout.h"
#include "product.h"

namespace attn::cpu::ATTN_ISA {
namespace {

constexpr uint64_t kBlockBits =
    kCols * kWidth == 64 ? ~uint64_t{0} : (uint64_t{1} << (kCols * kWidth % 64)) - 1;
constexpr uint64_t kVectorBits = (uint64_t{1} << kWidth) - 1;

// The products of a tile: s[key][query] = k[key] . packed[query], times `factor` where cells are pairs.
// Of a block, the vectors before the first in which a pair is visible are left as they are (`seen` null: all
// are visible). Meanwhile nk rows `ahead` are fetched, with the rows of k a block early, and nq rows
// `beside`.
ATTN_INLINE void score_products(Operand k, int64_t width, const Cell* packed, int64_t nq, int64_t nk,
                                const uint64_t* seen, Real factor, Real* s, const Ahead& ahead = Ahead(),
                                const Ahead& beside = Ahead()) {
  const Ahead keys(k.data, k.stride, cells(width));
  for (int64_t r = 0; r < nk; r += kRows) {
    const int64_t rows = least<int64_t>(kRows, nk - r);
    if (ahead.data) keys.fetch(r + kRows, least<int64_t>(r + 2 * kRows, nk));
    ahead.fetch(r, r + rows);
    beside.fetch(r * nq / nk, (r + rows) * nq / nk);
    uint64_t some = ~uint64_t{0};
    if (seen) {
      some = 0;
      for (int64_t i = 0; i < rows; ++i) some |= seen[r + i];
    }
    for (int64_t c = 0; c < nq; c += kCols * kWidth) {
      if (!(some >> c & kBlockBits)) continue;
      int64_t from = c;
      while (!(some >> from & kVectorBits)) from += kWidth;
      const int64_t vectors = least<int64_t>(kCols - (from - c) / kWidth, (nq - from + kWidth - 1) / kWidth);
      multiply_block<kAlongRows>(rows, vectors, depth_of(width), k.data + r * k.stride, k.stride,
                                 packed + from, kQueries, s + r * kQueries + from, kQueries, true, factor);
    }
  }
}

// kWidth columns of a matrix from (row 0, column 0) of `from` on, as far as `high` rows and `wide` columns
// go, else 0; turned.
template <class T>
ATTN_INLINE void read_corner(const T* from, int64_t row, int64_t col, int64_t high, int64_t wide,
                             Vec (&t)[kWidth]) {
  for (int64_t i = 0; i < kWidth; ++i) {
    if (i >= high) {
      t[i] = zero();
    } else if (col == 1) {
      t[i] = load_some(from + i * row, wide);
    } else {
      T line[kWidth] = {};
      for (int64_t x = 0; x < least<int64_t>(wide, kWidth); ++x) line[x] = from[i * row + x * col];
      t[i] = load(line);
    }
  }
  transpose(t);
}

// s[key][query] += factor * the number at [query * row + key * col].
template <class T>
ATTN_INLINE void add_matrix(const T* at, int64_t row, int64_t col, Real factor, int64_t nq, int64_t nk,
                            Real* s) {
  const Vec times = set(factor);
  if (row == 0) {
    for (int64_t j = 0; j < nk; ++j) {
      const Vec one = mul(set(load_one(at + j * col)), times);
      for (int64_t c = 0; c < nq; c += kWidth)
        store(s + j * kQueries + c, add(load(s + j * kQueries + c), one));
    }
    return;
  }
  for (int64_t c = 0; c < nq; c += kWidth) {
    const T* from = at + c * row;
    Real* to = s + c;
    int64_t j = 0;
    if (col == 1 && nq - c >= kWidth)
      for (; j + kWidth <= nk; j += kWidth) {
        Vec t[kWidth];
        ATTN_UNROLL
        for (int i = 0; i < kWidth; ++i) t[i] = load(from + i * row + j);
        transpose(t);
        ATTN_UNROLL
        for (int i = 0; i < kWidth; ++i)
          store(to + (j + i) * kQueries, fma(t[i], times, load(to + (j + i) * kQueries)));
      }
    for (; j < nk; j += kWidth) {
      Vec t[kWidth];
      read_corner(from + j * col, row, col, nq - c, nk - j, t);
      for (int64_t i = 0; i < least<int64_t>(kWidth, nk - j); ++i)
        store(to + (j + i) * kQueries, fma(t[i], times, load(to + (j + i) * kQueries)));
    }
  }
}

// What comes on top of the products, for one head of one sequence.
struct Extras {
  Real scale;  // of products, where they are not scaled yet
  Real softcap, slope;
  int64_t shift;  // ALiBi: |i + shift - j|
  bool alibi;
  const void* bias = nullptr;
  int64_t bias_row, bias_col;
  Dtype bias_dtype;

  ATTN_INLINE Extras(const Problem& p, const Sequence& s, int64_t head) {
    scale = product_scale(p);
    softcap = static_cast<Real>(p.softcap);
    alibi = p.alibi_slopes != nullptr;
    slope = alibi ? static_cast<Real>(p.alibi_slopes[s.number * p.Hq + head]) : 0;
    shift = s.keys - s.queries;
    if (!p.bias.data) return;
    bias_row = p.bias.row;
    bias_col = p.bias.col;
    bias_dtype = p.bias.dtype;
    bias = static_cast<const char*>(p.bias.data) +
           bias_size() *
               (s.batch * p.bias.batch + head * p.bias.head + s.q_first * bias_row + s.k_first * bias_col);
  }
  ATTN_INLINE int64_t bias_size() const {
    return bias_dtype == Dtype::f64 ? 8 : bias_dtype == Dtype::f32 ? 4 : 2;
  }
  // The rows of the bias of a tile, which lie far apart.
  ATTN_INLINE Ahead ahead(int64_t q0, int64_t k0, int64_t nk) const {
    Ahead rows;
    if (!bias || bias_row == 0 || bias_col != 1) return rows;
    rows.data = static_cast<const char*>(bias) + bias_size() * (q0 * bias_row + k0);
    rows.stride = bias_size() * bias_row;
    rows.bytes = bias_size() * nk;
    return rows;
  }
  ATTN_INLINE bool none() const { return !(softcap > 0) && !alibi && !bias; }
};

ATTN_NOINLINE void add_bias(const Extras& e, int64_t q0, int64_t nq, int64_t k0, int64_t nk, Real* s) {
  const int64_t at = q0 * e.bias_row + k0 * e.bias_col;
  switch (e.bias_dtype) {
    case Dtype::f32:
      return add_matrix(static_cast<const float*>(e.bias) + at, e.bias_row, e.bias_col, 1, nq, nk, s);
    case Dtype::bf16:
      return add_matrix(static_cast<const Bf16*>(e.bias) + at, e.bias_row, e.bias_col, 1, nq, nk, s);
    case Dtype::f16:
      return add_matrix(static_cast<const F16*>(e.bias) + at, e.bias_row, e.bias_col, 1, nq, nk, s);
    default:
      return add_matrix(static_cast<const double*>(e.bias) + at, e.bias_row, e.bias_col, 1, nq, nk, s);
  }
}

// Adds what is on top of the products. `d_cap`, where given, becomes the derivative of the soft cap, laid out
// as s (only written where there is one).
ATTN_NOINLINE void add_extras(const Extras& e, int64_t q0, int64_t nq, int64_t k0, int64_t nk, Real* s,
                              Real* d_cap) {
  const bool capped = e.softcap > 0;
  const Vec cap = set(e.softcap), uncap = set(capped ? 1 / e.softcap : 0), slope = set(e.slope), one = set(1);
  for (int64_t j = 0; j < nk && (capped || e.alibi); ++j)
    for (int64_t c = 0; c < nq; c += kWidth) {
      const int64_t at = j * kQueries + c;
      Vec x = load(s + at);
      if (capped) {
        const Vec t = tanh_of(mul(x, uncap));
        x = mul(cap, t);
        if (d_cap) store(d_cap + at, nfma(t, t, one));
      }
      if (e.alibi) {
        const Vec distance = add(set(static_cast<Real>(q0 + c + e.shift - k0 - j)), iota());
        x = nfma(slope, magnitude(distance), x);
      }
      store(s + at, x);
    }
  if (e.bias) add_bias(e, q0, nq, k0, nk, s);
}

// -infinity where a pair is hidden.
ATTN_INLINE void hide(const uint64_t* seen, int64_t nq, int64_t nk, Real* s) {
  const uint64_t all = bits_between(0, nq);
  const Vec nothing = set(-kInfinity);
  for (int64_t j = 0; j < nk; ++j) {
    if (seen[j] == all) continue;
    for (int64_t c = 0; c < nq; c += kWidth) {
      Real* at = s + j * kQueries + c;
      store(at, select(lanes_of(seen[j] >> c & ((uint64_t{1} << kWidth) - 1)), load(at), nothing));
    }
  }
}

// Raises maxima[query] to the largest score of each query; a NaN is passed over.
template <int N>
ATTN_INLINE void raise_maxima(const Real* s, int64_t nk, Real* maxima) {
  Vec x[N], y[N];  // chains enough that none waits for another
  ATTN_UNROLL
  for (int i = 0; i < N; ++i) x[i] = y[i] = load(maxima + i * kWidth);
  int64_t j = 0;
  for (; j + 1 < nk; j += 2) {
    ATTN_UNROLL
    for (int i = 0; i < N; ++i) {
      x[i] = max(load(s + j * kQueries + i * kWidth), x[i]);
      y[i] = max(load(s + (j + 1) * kQueries + i * kWidth), y[i]);
    }
  }
  ATTN_UNROLL
  for (int i = 0; i < N; ++i) {
    if (j < nk) x[i] = max(load(s + j * kQueries + i * kWidth), x[i]);
    store(maxima + i * kWidth, max(x[i], y[i]));
  }
}
ATTN_INLINE void raise_maxima(const Real* s, int64_t nq, int64_t nk, Real* maxima) {
  int64_t c = 0;
  for (; c + 3 * kWidth < nq; c += 4 * kWidth) raise_maxima<4>(s + c, nk, maxima + c);
  for (; c < nq; c += kWidth) raise_maxima<1>(s + c, nk, maxima + c);
}

// The scores of one tile, finished but for a positive factor, which is returned. `seen`: null where classify
// said kFull. Hidden pairs become -infinity.
ATTN_INLINE Real score_tile(const Extras& extras, Operand k, int64_t width, const Cell* packed, int64_t q0,
                            int64_t nq, int64_t k0, int64_t nk, const uint64_t* seen, Real* s, Real* d_cap,
                            const Ahead& ahead = Ahead()) {
  const bool later = extras.none() && extras.scale > 0;
  score_products(k, width, packed, nq, nk, seen, later ? 1 : extras.scale, s, ahead,
                 extras.ahead(q0, k0, nk));
  if (!extras.none()) add_extras(extras, q0, nq, k0, nk, s, d_cap);
  if (seen) hide(seen, nq, nk, s);
  return later ? extras.scale : 1;
}

// Multiplies by `factor` where the pair is kept, else 0.
ATTN_INLINE void drop(const uint64_t* kept, Real factor, int64_t nq, int64_t nk, Real* p) {
  const Vec times = set(factor);
  for (int64_t j = 0; j < nk; ++j)
    for (int64_t c = 0; c < nq; c += kWidth) {
      Real* at = p + j * kQueries + c;
      const Lanes on = lanes_of(kept[j] >> c & ((uint64_t{1} << kWidth) - 1));
      store(at, select(on, mul(load(at), times), zero()));
    }
}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
