// The online softmax of one tile of queries: everything is per lane.
#pragma once
#include "scores.h"

namespace attn::cpu::ATTN_ISA {
namespace {

// A row's shift moves only where its maximum has grown by more than this: a factor of 2^8 in the sums, and so
// the shift that is left for backward stays within 8 ln 2 of the maximum.
constexpr Real kSlack = static_cast<Real>(5.5);

struct Rows64 {
  Real m[kQueries], l[kQueries], maxima[kQueries], factor[kQueries];

  ATTN_INLINE void reset() {
    for (int i = 0; i < kQueries; ++i) {
      m[i] = -kInfinity;
      l[i] = 0;
    }
  }
  ATTN_INLINE void reset_maxima(int64_t nq) {
    const Vec low = set(-kInfinity);
    for (int64_t c = 0; c < nq; c += kWidth) store(maxima + c, low);
  }
  ATTN_INLINE void scale_maxima(int64_t nq, Real by) {
    for (int64_t c = 0; c < nq; c += kWidth) store(maxima + c, mul(load(maxima + c), set(by)));
  }
  // Takes the maxima of a new tile in; true where a shift moved, and then `factor` is what older sums shrink
  // by.
  ATTN_INLINE bool move(int64_t nq) {
    bool moved = false;
    for (int64_t c = 0; c < nq; c += kWidth)
      moved = moved || any(less(add(load(m + c), set(kSlack)), load(maxima + c)));
    if (!moved) return false;
    for (int64_t c = 0; c < nq; c += kWidth) {
      const Vec before = load(m + c), now = max(load(maxima + c), before);
      const Vec shrink = exp_of(sub(before, now));
      const Vec f = select(less(set(-kInfinity), before), shrink, zero());
      store(factor + c, f);
      store(m + c, now);
      store(l + c, mul(load(l + c), f));
    }
    return true;
  }
};

// -infinity, of rows that have seen nothing, as 0: exp(-inf - 0) is the 0 wanted there.
ATTN_INLINE Vec finite_shift(Vec m) { return select(less(set(-kInfinity), m), m, zero()); }

// e^(s factor - shift).
ATTN_INLINE Vec softened(Vec s, Vec factor, Vec minus_shift) { return exp_of(fma(s, factor, minus_shift)); }

// Four keys at a time: their sum is made first, which keeps the long sum of a row from gathering rounding
// errors.
template <int N, bool kAsCells>
ATTN_INLINE void exponentials(const uint64_t* seen, int64_t c, int64_t nk, Real factor, const Real* m,
                              Real* l, Real* s, Cell* columns) {
  Vec minus_shift[N], total[N];
  const Vec times = set(factor);
  ATTN_UNROLL
  for (int v = 0; v < N; ++v) {
    minus_shift[v] = sub(zero(), finite_shift(load(m + c + v * kWidth)));
    total[v] = zero();
  }
  const auto write = [&](const Vec* e, int n, int64_t j, int v) {
    if constexpr (kAsCells) {
      store_columns(e, n, columns + j / kPerCell * kQueries + c + v * kWidth);
    } else {
      for (int i = 0; i < n; ++i) store(s + (j + i) * kQueries + c + v * kWidth, e[i]);
    }
  };
  constexpr uint64_t lanes = (uint64_t{1} << (N * kWidth)) - 1;
  int64_t j = 0;
  for (; j + 3 < nk; j += 4) {
    const Real* at = s + j * kQueries + c;
    if (seen && !((seen[j] | seen[j + 1] | seen[j + 2] | seen[j + 3]) >> c & lanes)) {
      const Vec nothing[4] = {zero(), zero(), zero(), zero()};
      for (int v = 0; v < N; ++v) write(nothing, 4, j, v);
      continue;
    }
    ATTN_UNROLL
    for (int v = 0; v < N; ++v) {
      Vec e[4];
      ATTN_UNROLL
      for (int i = 0; i < 4; ++i)
        e[i] = softened(load(at + i * kQueries + v * kWidth), times, minus_shift[v]);
      write(e, 4, j, v);
      total[v] = add(total[v], add(add(e[0], e[1]), add(e[2], e[3])));
    }
  }
  if (const int rest = static_cast<int>(nk - j))
    for (int v = 0; v < N; ++v) {
      Vec e[3];
      for (int i = 0; i < rest; ++i) {
        e[i] = softened(load(s + (j + i) * kQueries + c + v * kWidth), times, minus_shift[v]);
        total[v] = add(total[v], e[i]);
      }
      write(e, rest, j, v);
    }
  ATTN_UNROLL
  for (int v = 0; v < N; ++v) store(l + c + v * kWidth, add(load(l + c + v * kWidth), total[v]));
}

// s becomes exp(s factor - m), or, where `columns` are given, those become what columns_of makes of that; l
// grows by its sums.
template <bool kAsCells = false>
ATTN_NOINLINE void exponentials(const uint64_t* seen, int64_t nq, int64_t nk, Real factor, const Real* m,
                                Real* l, Real* s, Cell* columns = nullptr) {
  int64_t c = 0;
  for (; c + kWidth < nq; c += 2 * kWidth) exponentials<2, kAsCells>(seen, c, nk, factor, m, l, s, columns);
  if (c < nq) exponentials<1, kAsCells>(seen, c, nk, factor, m, l, s, columns);
  if (kAsCells) end_columns(nk, columns);
}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
