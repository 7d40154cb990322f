// Vectors as plain loops, for any CPU; of double where ATTN_DOUBLE is defined, which is how float64 is
// served. The list of what such a header defines is in lanes.h.
#pragma once
#include "platform.h"

namespace attn::cpu::ATTN_ISA {
namespace {

#ifdef ATTN_DOUBLE
using Real = double;
#else
using Real = float;
#endif
constexpr int kWidth = 4, kRows = 6, kCols = 2;

struct Vec {
  Real x[kWidth];
};
struct Lanes {
  bool x[kWidth];
};
struct Words {
  uint32_t x[kWidth];
};

#define ATTN_EACH for (int i = 0; i < kWidth; ++i)

ATTN_INLINE float number(float x) { return x; }
ATTN_INLINE double number(double x) { return x; }
ATTN_INLINE float number(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
ATTN_INLINE float number(F16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  uint32_t bits = sign | (rest << 13);
  float y;
  if (rest >= 0x7c00) {  // infinity, NaN
    bits |= 0x7f800000u;
    memcpy(&y, &bits, 4);
    return y;
  }
  memcpy(&y, &bits, 4);
  return y * 5.192296858534828e33f;  // 2^112: the exponent's bias, and subnormals become normal
}
ATTN_INLINE void put(float* p, Real x) { *p = static_cast<float>(x); }
ATTN_INLINE void put(double* p, Real x) { *p = x; }
ATTN_INLINE void put(Bf16* p, Real x) {
  const float y = static_cast<float>(x);
  uint32_t bits;
  memcpy(&bits, &y, 4);
  p->bits = static_cast<uint16_t>(y != y ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
ATTN_INLINE void put(F16* p, Real x) {
  const float y = static_cast<float>(x);
  uint32_t bits;
  memcpy(&bits, &y, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
  uint32_t half;
  if (size > 0x7f800000) {
    half = 0x7e00;
  } else if (size >= 0x477ff000) {  // from 65520 on: infinity
    half = 0x7c00;
  } else if (size < 0x38800000) {  // below 2^-14: the sum's last bits are those of a subnormal half
    const float shifted = fabsf(y) + 0.5f;
    memcpy(&half, &shifted, 4);
    half -= 0x3f000000;
  } else {
    half = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | half);
}

template <class T>
ATTN_INLINE Vec load(const T* p) {
  Vec r;
  ATTN_EACH r.x[i] = static_cast<Real>(number(p[i]));
  return r;
}
template <class T>
ATTN_INLINE void store(T* p, Vec a) {
  ATTN_EACH put(p + i, a.x[i]);
}
ATTN_INLINE Vec set(Real x) {
  Vec r;
  ATTN_EACH r.x[i] = x;
  return r;
}
ATTN_INLINE Vec zero() { return set(0); }
ATTN_INLINE Vec iota() {
  Vec r;
  ATTN_EACH r.x[i] = static_cast<Real>(i);
  return r;
}

#define ATTN_BINARY(name, expression)  \
  ATTN_INLINE Vec name(Vec a, Vec b) { \
    Vec r;                             \
    ATTN_EACH r.x[i] = expression;     \
    return r;                          \
  }
ATTN_BINARY(add, a.x[i] + b.x[i])
ATTN_BINARY(sub, a.x[i] - b.x[i])
ATTN_BINARY(mul, a.x[i] * b.x[i])
ATTN_BINARY(div, a.x[i] / b.x[i])
ATTN_BINARY(max, a.x[i] > b.x[i] ? a.x[i] : b.x[i])
#undef ATTN_BINARY

ATTN_INLINE Vec fma(Vec a, Vec b, Vec c) { return add(mul(a, b), c); }
ATTN_INLINE Vec nfma(Vec a, Vec b, Vec c) { return sub(c, mul(a, b)); }
ATTN_INLINE Vec magnitude(Vec a) {
  ATTN_EACH a.x[i] = a.x[i] < 0 ? -a.x[i] : a.x[i];
  return a;
}

ATTN_INLINE Lanes less(Vec a, Vec b) {
  Lanes r;
  ATTN_EACH r.x[i] = a.x[i] < b.x[i];
  return r;
}
ATTN_INLINE Vec select(Lanes m, Vec a, Vec b) {
  ATTN_EACH a.x[i] = m.x[i] ? a.x[i] : b.x[i];
  return a;
}
ATTN_INLINE bool any(Lanes m) {
  bool r = false;
  ATTN_EACH r = r || m.x[i];
  return r;
}
ATTN_INLINE Lanes lanes_of(uint64_t bits) {
  Lanes r;
  ATTN_EACH r.x[i] = bits >> i & 1;
  return r;
}
#ifdef ATTN_DOUBLE
ATTN_INLINE Vec exponential(Vec a) {
  ATTN_EACH a.x[i] = exp(a.x[i]);
  return a;
}
ATTN_INLINE Vec tangent(Vec a) {
  ATTN_EACH a.x[i] = tanh(a.x[i]);
  return a;
}
#else
// The bits of 2^n where x + (2^23 * 1.5 + 127) has rounded x to n.
ATTN_INLINE Vec power_of_two(Vec t) {
  Words w;
  memcpy(&w, &t, sizeof w);
  ATTN_EACH w.x[i] <<= 23;
  memcpy(&t, &w, sizeof t);
  return t;
}
#endif

ATTN_INLINE Real sum(Vec a) { return (a.x[0] + a.x[1]) + (a.x[2] + a.x[3]); }

ATTN_INLINE void transpose(Vec (&r)[kWidth]) {
  for (int i = 0; i < kWidth; ++i)
    for (int j = 0; j < i; ++j) {
      const Real t = r[i].x[j];
      r[i].x[j] = r[j].x[i];
      r[j].x[i] = t;
    }
}

ATTN_INLINE Vec sums(Vec (&r)[kWidth]) {
  Vec total;
  ATTN_EACH total.x[i] = sum(r[i]);
  return total;
}

ATTN_INLINE Words words(uint32_t x) {
  Words r;
  ATTN_EACH r.x[i] = x;
  return r;
}
ATTN_INLINE Words load_words(const uint32_t* p) {
  Words r;
  memcpy(&r, p, sizeof r);
  return r;
}
ATTN_INLINE Words exclusive_or(Words a, Words b) {
  ATTN_EACH a.x[i] ^= b.x[i];
  return a;
}
ATTN_INLINE void multiply(Words a, uint32_t b, Words& high, Words& low) {
  ATTN_EACH {
    const uint64_t product = static_cast<uint64_t>(a.x[i]) * b;
    low.x[i] = static_cast<uint32_t>(product);
    high.x[i] = static_cast<uint32_t>(product >> 32);
  }
}
// One bit per word that is, unsigned, at least t.
ATTN_INLINE uint32_t at_least(Words a, uint32_t t) {
  uint32_t r = 0;
  ATTN_EACH r |= static_cast<uint32_t>(a.x[i] >= t) << i;
  return r;
}

// Bit i: byte p[i] is not 0.
ATTN_INLINE uint64_t true_bytes(const uint8_t* p) {
  uint64_t r = 0;
  for (int i = 0; i < 64; ++i) r |= static_cast<uint64_t>(p[i] != 0) << i;
  return r;
}

#undef ATTN_EACH

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
