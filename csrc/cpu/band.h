// Products of a tile [key][query] with rows, over no more pairs than the band lets see: a causal tile costs
// half. What is hidden inside these limits must be 0 in the tile.
#pragma once
#include "masks.h"
#include "product.h"

namespace attn::cpu::ATTN_ISA {
namespace {

// to[query] += tile[key][query] rows[key] (or =, where init). `to` has rows of round_up(width, kWidth).
ATTN_INLINE void add_to_queries(const Mask& mask, int64_t q0, int64_t nq, int64_t k0, int64_t nk,
                                const Real* tile, Operand rows, int64_t width, Real* to, bool init) {
  const int64_t stride = round_up(width, kWidth);
  for (int64_t i = 0; i < nq; i += kRows) {
    const int64_t n = least<int64_t>(kRows, nq - i);
    const Range r = mask.keys(q0 + i, n);
    const int64_t begin = clamp(r.begin - k0, 0, nk), end = clamp(r.end - k0, begin, nk);
    if (begin == end && !init) continue;
    multiply_rows<kAlongColumns>(n, width, end - begin, tile + begin * kQueries + i, kQueries,
                                 rows.data + begin * rows.stride, rows.stride, to + i * stride, stride, init);
  }
}

// to[key] += tile[key][query] rows[query].
ATTN_INLINE void add_to_keys(const Mask& mask, int64_t q0, int64_t nq, int64_t k0, int64_t nk,
                             const Real* tile, Operand rows, int64_t width, Real* to) {
  const int64_t stride = round_up(width, kWidth);
  for (int64_t j = 0; j < nk; j += kRows) {
    const int64_t n = least<int64_t>(kRows, nk - j);
    const Range r = mask.queries(k0 + j, n, q0 + nq);
    const int64_t begin = clamp(r.begin - q0, 0, nq), end = clamp(r.end - q0, begin, nq);
    if (begin == end) continue;
    multiply_rows<kAlongRows>(n, width, end - begin, tile + j * kQueries + begin, kQueries,
                              rows.data + begin * rows.stride, rows.stride, to + j * stride, stride, false);
  }
}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
