// Vectors of AVX2 with FMA and F16C. The list of what such a header defines is in lanes.h.
#pragma once
#include <immintrin.h>

#include "platform.h"

namespace attn::cpu::ATTN_ISA {
namespace {

using Real = float;
using Vec = __m256;
using Lanes = __m256;
using Words = __m256i;
constexpr int kWidth = 8, kRows = 6, kCols = 2;

ATTN_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
ATTN_INLINE Vec load(const Bf16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
ATTN_INLINE Vec load(const F16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
ATTN_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
ATTN_INLINE void store(F16* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
ATTN_INLINE void store(Bf16* p, Vec x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i top =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  // Rounding could carry a NaN into an infinity.
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  top = _mm256_blendv_epi8(top, _mm256_set1_epi32(0x7fc0), nan);
  const __m128i low = _mm256_castsi256_si128(top), high = _mm256_extracti128_si256(top, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
}
ATTN_INLINE Vec set(float x) { return _mm256_set1_ps(x); }
ATTN_INLINE Vec zero() { return _mm256_setzero_ps(); }
ATTN_INLINE Vec iota() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
ATTN_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
ATTN_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
ATTN_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
ATTN_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
ATTN_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
ATTN_INLINE Vec nfma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
ATTN_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
ATTN_INLINE Vec magnitude(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }

ATTN_INLINE Lanes less(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
ATTN_INLINE Vec select(Lanes m, Vec a, Vec b) { return _mm256_blendv_ps(b, a, m); }
ATTN_INLINE bool any(Lanes m) { return _mm256_movemask_ps(m) != 0; }
ATTN_INLINE Lanes lanes_of(uint64_t bits) {
  const __m256i one = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, one), one));
}
// The bits of 2^n where x + (2^23 * 1.5 + 127) has rounded x to n.
ATTN_INLINE Vec power_of_two(Vec t) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t), 23));
}

ATTN_INLINE float sum(Vec x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

ATTN_INLINE void transpose(Vec (&r)[kWidth]) {
  Vec t[8];
  ATTN_UNROLL
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  ATTN_UNROLL
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  ATTN_UNROLL
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  ATTN_UNROLL
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

ATTN_INLINE Vec sums(Vec (&r)[kWidth]) {
  ATTN_UNROLL
  for (int n = 4; n > 1; n /= 2) ATTN_UNROLL
  for (int i = 0; i < n; ++i) r[i] = _mm256_hadd_ps(r[2 * i], r[2 * i + 1]);
  return add(_mm256_permute2f128_ps(r[0], r[1], 0x20), _mm256_permute2f128_ps(r[0], r[1], 0x31));
}

ATTN_INLINE Words words(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
ATTN_INLINE Words load_words(const uint32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
ATTN_INLINE Words exclusive_or(Words a, Words b) { return _mm256_xor_si256(a, b); }
ATTN_INLINE void multiply(Words a, uint32_t b, Words& high, Words& low) {
  const __m256i m = words(b);
  const __m256i even = _mm256_mul_epu32(a, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), m);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
// One bit per word that is, unsigned, at least t.
ATTN_INLINE uint32_t at_least(Words a, uint32_t t) {
  const __m256i same = _mm256_cmpeq_epi32(_mm256_max_epu32(a, words(t)), a);
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(same)));
}

// Bit i: byte p[i] is not 0.
ATTN_INLINE uint64_t true_bytes(const uint8_t* p) {
  const __m256i none = _mm256_setzero_si256();
  const auto* at = reinterpret_cast<const __m256i*>(p);
  const int low = _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_loadu_si256(at), none));
  const int high = _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_loadu_si256(at + 1), none));
  return ~(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | static_cast<uint32_t>(low));
}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
