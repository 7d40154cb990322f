// Rows of q, k, v, d_out in and out: packed as columns, widened, rounded.
#pragma once
#include "lanes.h"

namespace attn::cpu::ATTN_ISA {
namespace {

// Cuts memory into aligned pieces; from 0 on it only counts.
struct Carver {
  uintptr_t at;

  template <class A>
  ATTN_INLINE A* take(int64_t n) {
    const uintptr_t here = at;
    at += static_cast<uintptr_t>(round_up(n * static_cast<int64_t>(sizeof(A)), 64));
    return reinterpret_cast<A*>(here);
  }
};

// A Space(carver, ...) in the scratch of this thread.
template <class Space, class... Sizes>
ATTN_INLINE Space carve(Sizes... sizes) {
  Carver counted{0};
  Space(counted, sizes...);
  Carver real{reinterpret_cast<uintptr_t>(scratch(counted.at))};
  return Space(real, sizes...);
}

// Queries per tile; the stride of every score tile, which is [key][query].
constexpr int kQueries = 64;

template <class T>
constexpr bool kInPlace = sizeof(T) == sizeof(Real);  // rows of T can be operands of a product as they are

// `rows` (<= kQueries) rows of `width` numbers, times `factor`, to columns: to[d * kQueries + row]. Rows up
// to the next multiple of kWidth are 0; the space for `width` must be rounded up to kWidth.
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

// `rows` rows of `width` numbers to Reals, `to_stride` apart, 0 from width up to the next multiple of kWidth.
template <class T>
ATTN_INLINE void widen_rows(const T* from, int64_t stride, int64_t rows, int64_t width, Real* to,
                            int64_t to_stride) {
  const int64_t whole = width / kWidth * kWidth;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < whole; d += kWidth) store(to + r * to_stride + d, load(from + r * stride + d));
    if (whole < width) store(to + r * to_stride + whole, load_some(from + r * stride + whole, width - whole));
  }
}

// One row of Reals, times `factor`, out as T.
template <class T>
ATTN_INLINE void write_row(const Real* from, Real factor, int64_t width, T* to) {
  const Vec times = set(factor);
  const int64_t whole = width / kWidth * kWidth;
  for (int64_t d = 0; d < whole; d += kWidth) store(to + d, mul(load(from + d), times));
  if (whole < width) store_some(to + whole, mul(load(from + whole), times), width - whole);
}
template <class T>
ATTN_INLINE void zero_row(int64_t width, T* to) {
  memset(to, 0, static_cast<size_t>(width) * sizeof(T));
}

// Rows as the right operand of a product: in place where they are Reals of whole vectors, else widened into
// `space`, which has room for rows * round_up(width, kWidth) Reals.
struct Operand {
  const Real* data;
  int64_t stride;
};
template <class T>
ATTN_INLINE Operand right_operand(const T* from, int64_t stride, int64_t rows, int64_t width, Real* space) {
  if constexpr (kInPlace<T>)
    if (width % kWidth == 0) return {from, stride};
  widen_rows(from, stride, rows, width, space, round_up(width, kWidth));
  return {space, round_up(width, kWidth)};
}
template <class T>
ATTN_INLINE bool is_near(int64_t stride, int64_t width) {
  return kInPlace<T> && stride <= width && width % kWidth == 0;
}
// The same, copied where the rows lie far apart: those of a packed projection would meet in few sets of the
// first cache.
template <class T>
ATTN_INLINE Operand near_operand(const T* from, int64_t stride, int64_t rows, int64_t width, Real* space) {
  if constexpr (kInPlace<T>)
    if (is_near<T>(stride, width)) return {from, stride};
  widen_rows(from, stride, rows, width, space, round_up(width, kWidth));
  return {space, round_up(width, kWidth)};
}
// As the left operand along rows, of which single numbers are read: in place for any width.
template <class T>
ATTN_INLINE Operand left_operand(const T* from, int64_t stride, int64_t rows, int64_t width, Real* space) {
  if constexpr (kInPlace<T>) {
    return {from, stride};
  } else {
    widen_rows(from, stride, rows, width, space, round_up(width, kWidth));
    return {space, round_up(width, kWidth)};
  }
}

// Rows that will be wanted soon, as bytes. Rows of one head of many are short pieces far apart, which no CPU
// foresees by itself.
struct Ahead {
  const char* data = nullptr;
  int64_t stride = 0, bytes = 0;

  Ahead() = default;
  template <class T>
  ATTN_INLINE Ahead(const T* from, int64_t row_stride, int64_t width)
      : data(reinterpret_cast<const char*>(from)),
        stride(row_stride * static_cast<int64_t>(sizeof(T))),
        bytes(width * static_cast<int64_t>(sizeof(T))) {}

  ATTN_INLINE void fetch(int64_t begin, int64_t end) const {
    if (!data) return;
    for (int64_t r = begin; r < end; ++r)
      for (int64_t at = 0; at < bytes; at += 64) ATTN_PREFETCH(data + r * stride + at);
  }
};

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
