// What is summed up for the queries of a tile, out or dq: rows of them, [query][round_up(width, kWidth)], or
// turned where products are of tiles, [round_up(width, kWidth)][kQueries]. Probabilities are a right operand
// there.
#pragma once
#include "weights.h"

namespace attn::cpu::ATTN_ISA {
namespace {

// Each of the first nq queries' sums times its factor.
ATTN_INLINE void scale_sums(const Real* factor, int64_t nq, int64_t width, Real* sums) {
  const int64_t wide = round_up(width, kWidth);
  if constexpr (kTurned) {
    for (int64_t c = 0; c < nq; c += kWidth) {
      const Vec f = load(factor + c);
      for (int64_t d = 0; d < wide; ++d)
        store(sums + d * kQueries + c, mul(load(sums + d * kQueries + c), f));
    }
  } else {
    for (int64_t i = 0; i < nq; ++i) {
      if (factor[i] == 1) continue;
      const Vec f = set(factor[i]);
      Real* row = sums + i * wide;
      for (int64_t d = 0; d < wide; d += kWidth) store(row + d, mul(load(row + d), f));
    }
  }
}

// Each times its factor, out as rows of T; 0 where the factor is 0, whatever stands there then.
template <class T>
ATTN_INLINE void write_sums(const Real* factor, int64_t nq, int64_t width, Real* sums, T* to,
                            int64_t stride) {
  if constexpr (kTurned) {
    scale_sums(factor, nq, width, sums);
    write_transposed(sums, 1, nq, width, to, stride);
  }
  for (int64_t i = 0; i < nq; ++i) {
    if (factor[i] == 0)
      zero_row(width, to + i * stride);
    else if constexpr (!kTurned)
      write_row(sums + i * round_up(width, kWidth), factor[i], width, to + i * stride);
  }
}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
