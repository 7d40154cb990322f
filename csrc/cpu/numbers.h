// Operands whose cells are single Reals; see operands.h.
#pragma once
#include "operands.h"

namespace attn::cpu::ATTN_ISA {
namespace {

template <class T>
constexpr bool kInPlace = sizeof(T) == sizeof(Real);  // rows of T can be operands of a product as they are

// Where rows lie near each other and are whole vectors, they are a right operand in place. Those of a packed
// projection lie far apart and would meet in few sets of the first cache.
template <class T>
ATTN_INLINE bool is_near(int64_t stride, int64_t width) {
  return kInPlace<T> && stride <= width && width % kWidth == 0;
}

// `rows` (<= kQueries) rows of `width` numbers, times `factor`: to[d * kQueries + row]. Rows up to the next
// multiple of kWidth are 0; `to` has packed_size(width) cells.
template <class T>
ATTN_INLINE void pack_columns(const T* from, int64_t stride, int64_t rows, int64_t width, Real factor,
                              Real* to) {
  const Vec times = set(factor);
  for (int64_t r = 0; r < rows; r += kWidth)
    for (int64_t d = 0; d < width; d += kWidth) {
      Vec t[kWidth];
      const int64_t have = rows - r, wide = width - d;
      if (wide >= kWidth && have >= kWidth) {
        ATTN_UNROLL
        for (int i = 0; i < kWidth; ++i) t[i] = mul(load(from + (r + i) * stride + d), times);
      } else {
        for (int i = 0; i < kWidth; ++i)
          t[i] = i < have ? mul(load_some(from + (r + i) * stride + d, wide), times) : zero();
      }
      transpose(t);
      ATTN_UNROLL
      for (int i = 0; i < kWidth; ++i) store(to + (d + i) * kQueries + r, t[i]);
    }
}

// Copied, where that is needed, into `space`, which has room for rows * round_up(width, kWidth) cells.
template <class T>
ATTN_INLINE Operand right_operand(const T* from, int64_t stride, int64_t rows, int64_t width, Cell* space) {
  if constexpr (kInPlace<T>)
    if (is_near<T>(stride, width)) return {from, stride};
  widen_rows(from, stride, rows, width, space, round_up(width, kWidth));
  return {space, round_up(width, kWidth)};
}
// Single numbers are read: in place for any width.
template <class T>
ATTN_INLINE Operand left_operand(const T* from, int64_t stride, int64_t rows, int64_t width, Cell* space) {
  if constexpr (kInPlace<T>) {
    return {from, stride};
  } else {
    widen_rows(from, stride, rows, width, space, round_up(width, kWidth));
    return {space, round_up(width, kWidth)};
  }
}

template <class T>
ATTN_INLINE Operand key_operand(const T* from, int64_t stride, int64_t rows, int64_t width, Cell* space) {
  return right_operand(from, stride, rows, width, space);
}

ATTN_INLINE void store_columns(const Vec* keys, int n, Cell* to) {
  for (int i = 0; i < n; ++i) store(to + i * kQueries, keys[i]);
}
ATTN_INLINE void end_columns(int64_t, Cell*) {}
ATTN_INLINE const Cell* columns_of(const Real* tile, int64_t, int64_t, Cell*) { return tile; }
ATTN_INLINE const Cell* rows_of(const Real* tile, int64_t, int64_t, Cell*) { return tile; }

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
