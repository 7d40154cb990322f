// Conversions and approximations as the GPU does them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace emu {

inline uint32_t float_bits(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return u;
}
inline float bits_float(uint32_t u) {
  float v;
  std::memcpy(&v, &u, 4);
  return v;
}

inline float bf16_to_float(uint16_t h) { return bits_float(uint32_t(h) << 16); }

// To nearest, ties to even; every NaN becomes 0x7fff.
inline uint16_t float_to_bf16(float v) {
  const uint32_t u = float_bits(v);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline float fp16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 31) return bits_float(sign | 0x7f800000 | mantissa << 13);
  if (exponent) return bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
  const float subnormal = float(mantissa) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

inline uint16_t float_to_fp16(float v) {
  const uint32_t u = float_bits(v), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return 0x7fff;
  if (a >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and more round to infinity
  if (a < 0x38800000) return uint16_t(sign | uint32_t(std::nearbyint(bits_float(a) * 0x1p24f)));
  const uint32_t r = a - 0x38000000;
  return uint16_t(sign | ((r + 0xfff + ((r >> 13) & 1)) >> 13));
}

// To nearest, ties away from 0, in the upper 19 bits.
inline uint32_t float_to_tf32(float v) {
  const uint32_t u = float_bits(v);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fffffff;
  if ((u & 0x7fffffff) == 0x7f800000) return u;
  return (u + 0x1000) & 0xffffe000;
}

inline float flush(float v) {
  return std::fabs(v) < std::numeric_limits<float>::min() ? std::copysign(0.f, v) : v;
}
inline float ex2(float x) { return flush(std::exp2(flush(x))); }
inline float lg2(float x) { return std::log2(flush(x)); }
inline float rcp(float x) { return flush(1.0f / flush(x)); }

}  // namespace emu
