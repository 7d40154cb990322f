// Vectors of AVX-512 (F, BW, DQ, VL). The list of what such a header defines is in lanes.h.
#pragma once
#include <immintrin.h>

#include "platform.h"

namespace attn::cpu::ATTN_ISA {
namespace {

using Real = float;
using Vec = __m512;
using Lanes = __mmask16;
using Words = __m512i;
constexpr int kWidth = 16;
#ifndef ATTN_TILES
constexpr int kRows = 6, kCols = 4;
#endif

ATTN_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
ATTN_INLINE Vec load(const Bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
ATTN_INLINE Vec load(const F16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
ATTN_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
ATTN_INLINE void store(F16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
ATTN_INLINE void store(Bf16* p, Vec x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i top =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  // Rounding could carry a NaN into an infinity.
  top = _mm512_mask_mov_epi32(top, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(top));
}
ATTN_INLINE Vec set(float x) { return _mm512_set1_ps(x); }
ATTN_INLINE Vec zero() { return _mm512_setzero_ps(); }
ATTN_INLINE Vec iota() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
ATTN_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
ATTN_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
ATTN_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
ATTN_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
ATTN_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
ATTN_INLINE Vec nfma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
ATTN_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
ATTN_INLINE Vec magnitude(Vec a) { return _mm512_abs_ps(a); }

ATTN_INLINE Lanes less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
ATTN_INLINE Vec select(Lanes m, Vec a, Vec b) { return _mm512_mask_blend_ps(m, b, a); }
ATTN_INLINE bool any(Lanes m) { return m != 0; }
ATTN_INLINE Lanes lanes_of(uint64_t bits) { return static_cast<Lanes>(bits); }
// The bits of 2^n where x + (2^23 * 1.5 + 127) has rounded x to n.
ATTN_INLINE Vec power_of_two(Vec t) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(t), 23));
}

ATTN_INLINE float sum(Vec x) { return _mm512_reduce_add_ps(x); }

ATTN_INLINE void transpose(Vec (&r)[kWidth]) {
  Vec t[16];
  ATTN_UNROLL
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  ATTN_UNROLL
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
    const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  ATTN_UNROLL
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  ATTN_UNROLL
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Vectors are added as they are transposed, which halves them at each step.
ATTN_INLINE Vec sums(Vec (&r)[kWidth]) {
  ATTN_UNROLL
  for (int i = 0; i < 8; ++i)
    r[i] = add(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
  ATTN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(r[2 * i]), b = _mm512_castps_pd(r[2 * i + 1]);
    r[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  ATTN_UNROLL
  for (int n = 2; n > 0; n /= 2) ATTN_UNROLL
  for (int i = 0; i < n; ++i)
    r[i] = add(_mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0x88),
               _mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0xdd));
  return r[0];
}

ATTN_INLINE Words words(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
ATTN_INLINE Words load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
ATTN_INLINE Words exclusive_or(Words a, Words b) { return _mm512_xor_si512(a, b); }
ATTN_INLINE void multiply(Words a, uint32_t b, Words& high, Words& low) {
  const __m512i m = words(b);
  const __m512i even = _mm512_mul_epu32(a, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), m);
  low = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
  high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
}
// One bit per word that is, unsigned, at least t.
ATTN_INLINE uint32_t at_least(Words a, uint32_t t) { return _mm512_cmpge_epu32_mask(a, words(t)); }

// Bit i: byte p[i] is not 0.
ATTN_INLINE uint64_t true_bytes(const uint8_t* p) {
  const __m512i x = _mm512_loadu_si512(p);
  return _mm512_test_epi8_mask(x, x);
}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
