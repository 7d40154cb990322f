// Vectors of AArch64. The list of what such a header defines is in lanes.h.
#pragma once
#include <arm_neon.h>

#include "platform.h"

namespace attn::cpu::ATTN_ISA {
namespace {

using Real = float;
using Vec = float32x4_t;
using Lanes = uint32x4_t;
using Words = uint32x4_t;
constexpr int kWidth = 4, kRows = 6, kCols = 4;

ATTN_INLINE Vec load(const float* p) { return vld1q_f32(p); }
ATTN_INLINE Vec load(const Bf16* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16)); }
ATTN_INLINE Vec load(const F16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
ATTN_INLINE void store(float* p, Vec x) { vst1q_f32(p, x); }
ATTN_INLINE void store(F16* p, Vec x) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
ATTN_INLINE void store(Bf16* p, Vec x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t top = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
  // Rounding could carry a NaN into an infinity.
  vst1_u16(&p->bits, vmovn_u32(vbslq_u32(vceqq_f32(x, x), top, vdupq_n_u32(0x7fc0))));
}
ATTN_INLINE Vec set(float x) { return vdupq_n_f32(x); }
ATTN_INLINE Vec zero() { return vdupq_n_f32(0); }
ATTN_INLINE Vec iota() {
  const float x[4] = {0, 1, 2, 3};
  return vld1q_f32(x);
}
ATTN_INLINE Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
ATTN_INLINE Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
ATTN_INLINE Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
ATTN_INLINE Vec div(Vec a, Vec b) { return vdivq_f32(a, b); }
ATTN_INLINE Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
ATTN_INLINE Vec nfma(Vec a, Vec b, Vec c) { return vfmsq_f32(c, a, b); }
ATTN_INLINE Vec max(Vec a, Vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
ATTN_INLINE Vec magnitude(Vec a) { return vabsq_f32(a); }

ATTN_INLINE Lanes less(Vec a, Vec b) { return vcltq_f32(a, b); }
ATTN_INLINE Vec select(Lanes m, Vec a, Vec b) { return vbslq_f32(m, a, b); }
ATTN_INLINE bool any(Lanes m) { return vmaxvq_u32(m) != 0; }
ATTN_INLINE Lanes lanes_of(uint64_t bits) {
  const uint32_t one[4] = {1, 2, 4, 8};
  return vtstq_u32(vdupq_n_u32(static_cast<uint32_t>(bits)), vld1q_u32(one));
}
// The bits of 2^n where x + (2^23 * 1.5 + 127) has rounded x to n.
ATTN_INLINE Vec power_of_two(Vec t) {
  return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(t), 23));
}

ATTN_INLINE float sum(Vec x) { return vaddvq_f32(x); }

ATTN_INLINE void transpose(Vec (&r)[kWidth]) {
  const float32x4x2_t a = vtrnq_f32(r[0], r[1]), b = vtrnq_f32(r[2], r[3]);
  r[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
  r[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
  r[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
  r[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

ATTN_INLINE Vec sums(Vec (&r)[kWidth]) { return vpaddq_f32(vpaddq_f32(r[0], r[1]), vpaddq_f32(r[2], r[3])); }

ATTN_INLINE Words words(uint32_t x) { return vdupq_n_u32(x); }
ATTN_INLINE Words load_words(const uint32_t* p) { return vld1q_u32(p); }
ATTN_INLINE Words exclusive_or(Words a, Words b) { return veorq_u32(a, b); }
ATTN_INLINE void multiply(Words a, uint32_t b, Words& high, Words& low) {
  const uint32x2_t m = vdup_n_u32(b);
  const uint32x4_t x = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a), m));
  const uint32x4_t y = vreinterpretq_u32_u64(vmull_u32(vget_high_u32(a), m));
  low = vuzp1q_u32(x, y);
  high = vuzp2q_u32(x, y);
}
// One bit per word that is, unsigned, at least t.
ATTN_INLINE uint32_t at_least(Words a, uint32_t t) {
  const uint32_t one[4] = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(vcgeq_u32(a, vdupq_n_u32(t)), vld1q_u32(one)));
}

// Bit i: byte p[i] is not 0.
ATTN_INLINE uint64_t true_bytes(const uint8_t* p) {
  const uint8_t one[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const uint8x16_t bit = vld1q_u8(one);
  uint64_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint8x16_t x = vld1q_u8(p + 16 * i), set = vandq_u8(vtstq_u8(x, x), bit);
    const uint64_t word = vaddv_u8(vget_low_u8(set)) | static_cast<uint64_t>(vaddv_u8(vget_high_u8(set)))
                                                           << 8;
    result |= word << (16 * i);
  }
  return result;
}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
