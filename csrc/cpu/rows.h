// Rows of numbers in and out: scratch for them, widened, rounded, fetched ahead.
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
