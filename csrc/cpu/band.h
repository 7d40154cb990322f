// Products of a tile [key][query] with rows, over no more cells than the band lets see: a causal tile costs
// half. What is hidden inside these limits must be 0 in the tile.
#pragma once
#include "masks.h"
#include "product.h"

namespace attn::cpu::ATTN_ISA {
namespace {

struct CellRange {
  int64_t begin, size;
};
// The cells that hold the part of r inside [0, n), in whole depths.
ATTN_INLINE CellRange cells_of(Range r, int64_t n) {
  const int64_t begin = clamp(r.begin, 0, n), end = clamp(r.end, begin, n);
  const int64_t first = begin / kPerCell / kDepth * kDepth;
  return {first, begin == end ? 0 : depth_of(end) - first};
}

// to[query] += tile[key][query] rows[key] (or =, where init), of columns_of a tile and a key_operand. `to` is
// sums of queries (sums.h).
ATTN_INLINE void add_to_queries(const Mask& mask, int64_t q0, int64_t nq, int64_t k0, int64_t nk,
                                const Cell* tile, Operand rows, int64_t width, Real* to, bool init) {
  const int64_t wide = round_up(width, kWidth), together = kTurned ? kCols * kWidth : kRows;
  for (int64_t i = 0; i < nq; i += together) {
    const int64_t n = least(together, nq - i);
    const Range r = mask.keys(q0 + i, n);
    const CellRange along = cells_of({r.begin - k0, r.end - k0}, nk);
    if (along.size == 0 && !init) continue;
    const Cell* from = tile + along.begin * kQueries + i;
    if constexpr (kTurned) {
      for (int64_t d = 0; d < wide; d += kRows)
        multiply_rows<kAlongRows>(least<int64_t>(kRows, wide - d), n, along.size,
                                  rows.data + d * rows.stride + along.begin, rows.stride, from, kQueries,
                                  to + d * kQueries + i, kQueries, init);
    } else {
      multiply_rows<kAlongColumns>(n, width, along.size, from, kQueries,
                                   rows.data + along.begin * rows.stride, rows.stride, to + i * wide, wide,
                                   init);
    }
  }
}

// to[key] += tile[key][query] rows[query], of rows_of a tile and a right operand.
ATTN_INLINE void add_to_keys(const Mask& mask, int64_t q0, int64_t nq, int64_t k0, int64_t nk,
                             const Cell* tile, Operand rows, int64_t width, Real* to) {
  const int64_t stride = round_up(width, kWidth), tile_stride = kQueries / kPerCell;
  for (int64_t j = 0; j < nk; j += kRows) {
    const int64_t n = least<int64_t>(kRows, nk - j);
    const Range r = mask.queries(k0 + j, n, q0 + nq);
    const CellRange along = cells_of({r.begin - q0, r.end - q0}, nq);
    if (along.size == 0) continue;
    multiply_rows<kAlongRows>(n, width, along.size, tile + j * tile_stride + along.begin, tile_stride,
                              rows.data + along.begin * rows.stride, rows.stride, to + j * stride, stride,
                              false);
  }
}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
