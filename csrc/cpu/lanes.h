// The vector functions that all kernels use: what a vec_*.h defines, and what follows from it.
//
// How a source of one instruction set is made: define ATTN_ISA (the name of its namespace), include its
// vec_*.h, then the kernels. Everything inside is in an unnamed namespace, so that two sources may include
// the same headers under different flags. A vec_*.h defines, with kWidth lanes per vector and a block of
// kRows x (kCols vectors) accumulators in registers:
//
//   Real, Vec      float (double in the float64 source), and kWidth of them
//   Lanes          a truth per lane: less(a, b), select(lanes, yes, no), any(lanes), lanes_of(bits)
//   Words          kWidth unsigned 32-bit numbers, for dropout: words, load_words, exclusive_or, multiply
//
//   load, store    of float, Bf16, F16: widening, rounding to nearest even, without alignment
//
//   fma(a, b, c)   a * b + c, and nfma(a, b, c) is c - a * b; set zero iota add sub mul div magnitude sum
//
//   max(a, b)      b where a or b is NaN: running maxima stand second, so that a NaN score is passed over
//
//   transpose      kWidth vectors; sums: of vector i across its lanes, in lane i; true_bytes: 64 bytes to 64
//   bits; at_least: words to bits
//
// One that multiplies pairs also defines ATTN_PAIRS and what operands.h takes for its cells; one whose
// products are of tiles ATTN_TILES and kDepth besides (product_amx.h).
#pragma once
#include <limits>

#include "platform.h"

namespace attn::cpu::ATTN_ISA {
namespace {

constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

template <class A>
ATTN_INLINE A least(A a, A b) {
  return b < a ? b : a;
}
template <class A>
ATTN_INLINE A most(A a, A b) {
  return a < b ? b : a;
}
ATTN_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}
ATTN_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

#ifndef ATTN_TILES
constexpr int kDepth = 1;  // products sum over multiples of so many cells
#endif

#ifndef ATTN_PAIRS
using Cell = Real;  // see operands.h
using Cells = Vec;
constexpr int kPerCell = 1;

ATTN_INLINE Cells load_cells(const Cell* p) { return load(p); }
ATTN_INLINE Cells broadcast(const Cell* p) { return set(*p); }
ATTN_INLINE Vec multiply_add(Cells a, Cells b, Vec c) { return fma(a, b, c); }
#endif

#ifdef ATTN_DOUBLE
ATTN_INLINE Vec exp_of(Vec x) { return exponential(x); }
ATTN_INLINE Vec tanh_of(Vec x) { return tangent(x); }
#else
// e^x for x up to 88; 0 below -87.7; NaN stays. n = round(x / ln 2), and a minimax polynomial for 2^f, |f| <=
// 1/2: relative error 9.2e-8 before rounding, and exactly 1 at 0.
ATTN_INLINE Vec exp_of(Vec x) {
  const Vec log2e = set(1.44269504f);
  x = max(set(-88.f), x);
  const Vec t = fma(x, log2e, set(12582912.f + 127.f));
  const Vec f = fma(x, log2e, sub(set(12582912.f + 127.f), t));
  Vec p = fma(set(0.00132647273f), f, set(0.00967151277f));
  p = fma(p, f, set(0.0555073374f));
  p = fma(p, f, set(0.240222421f));
  p = fma(p, f, set(0.693146978f));
  p = fma(p, f, set(1.f));
  return mul(p, power_of_two(t));
}

// By exp, and near 0, where that would cancel, by an odd minimax polynomial (relative error 3e-9 below 0.6).
ATTN_INLINE Vec tanh_of(Vec x) {
  const Vec size = magnitude(x), e = exp_of(mul(size, set(-2.f)));
  Vec far = div(sub(set(1.f), e), add(set(1.f), e));
  far = select(less(x, zero()), sub(zero(), far), far);
  const Vec z = mul(x, x);
  Vec p = fma(set(-0.00589508518f), z, set(0.0207959144f));
  p = fma(p, z, set(-0.053783815f));
  p = fma(p, z, set(0.13331924f));
  p = fma(p, z, set(-0.33333298f));
  return select(less(size, set(0.6f)), fma(mul(p, z), x, x), far);
}

ATTN_INLINE Vec load(const double* p) {
  float t[kWidth];
  for (int i = 0; i < kWidth; ++i) t[i] = static_cast<float>(p[i]);
  return load(t);
}
ATTN_INLINE void store(double* p, Vec x) {
  float t[kWidth];
  store(t, x);
  for (int i = 0; i < kWidth; ++i) p[i] = t[i];
}
#endif

// The first n of kWidth numbers, 0 for the others; none but those n is read or written.
template <class T>
ATTN_INLINE Vec load_some(const T* p, int64_t n) {
  if (n >= kWidth) return load(p);
  T t[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) t[i] = p[i];
  return load(t);
}
template <class T>
ATTN_INLINE void store_some(T* p, Vec x, int64_t n) {
  if (n >= kWidth) return store(p, x);
  T t[kWidth];
  store(t, x);
  for (int64_t i = 0; i < n; ++i) p[i] = t[i];
}
template <class T>
ATTN_INLINE Real load_one(const T* p) {
  Real t[kWidth];
  store(t, load_some(p, 1));
  return t[0];
}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
