// Stands in for <immintrin.h> in a build that runs the AVX-512 and AMX kernels on a CPU of AVX2: SIMDe's
// functions under the names of the intrinsics, and the few that SIMDe 0.7.4 lacks. For tests; found first
// through -I.
#pragma once
#include_next <immintrin.h>
// The order matters: SIMDe takes what is included above for the intrinsics that the CPU has.
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <string.h>

#include <cstdint>

namespace emulated {

inline simde__m512 join(__m256 low, __m256 high) {
  simde__m512 r;
  memcpy(&r, &low, sizeof low);
  memcpy(reinterpret_cast<char*>(&r) + sizeof low, &high, sizeof high);
  return r;
}
inline __m256 half(simde__m512 x, int which) {
  __m256 r;
  memcpy(&r, reinterpret_cast<const char*>(&x) + which * sizeof r, sizeof r);
  return r;
}

inline simde__m512i cvtepu16_epi32(__m256i x) {
  uint16_t from[16];
  uint32_t to[16];
  memcpy(from, &x, sizeof from);
  for (int i = 0; i < 16; ++i) to[i] = from[i];
  simde__m512i r;
  memcpy(&r, to, sizeof to);
  return r;
}
inline __m256i cvtepi32_epi16(simde__m512i x) {
  uint32_t from[16];
  uint16_t to[16];
  memcpy(from, &x, sizeof from);
  for (int i = 0; i < 16; ++i) to[i] = static_cast<uint16_t>(from[i]);
  __m256i r;
  memcpy(&r, to, sizeof to);
  return r;
}
inline simde__m512 cvtph_ps(__m256i x) {
  return join(_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1)));
}
template <int rounding>
inline __m256i cvtps_ph(simde__m512 x) {
  return _mm256_set_m128i(_mm256_cvtps_ph(half(x, 1), rounding), _mm256_cvtps_ph(half(x, 0), rounding));
}
template <int which>
inline simde__m512 shuffle_f32x4(simde__m512 a, simde__m512 b) {
  float from[32], to[16];
  memcpy(from, &a, sizeof a);
  memcpy(from + 16, &b, sizeof b);
  for (int i = 0; i < 4; ++i) memcpy(to + 4 * i, from + (i < 2 ? 0 : 16) + 4 * (which >> (2 * i) & 3), 16);
  simde__m512 r;
  memcpy(&r, to, sizeof to);
  return r;
}
inline float reduce_add_ps(simde__m512 x) {
  float t[16];
  memcpy(t, &x, sizeof t);
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) t[i] += t[i + n];
  return t[0];
}

// As the instruction: to nearest even, a number below the normal ones is 0, a NaN is quiet.
inline uint16_t bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t size = bits & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  if (size < 0x00800000) return static_cast<uint16_t>(bits >> 16 & 0x8000);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// b becomes the low half.
inline simde__m512bh cvtne2ps_pbh(simde__m512 a, simde__m512 b) {
  float from[32];
  uint16_t to[32];
  memcpy(from, &b, sizeof b);
  memcpy(from + 16, &a, sizeof a);
  for (int i = 0; i < 32; ++i) to[i] = bf16(from[i]);
  simde__m512bh r;
  memcpy(&r, to, sizeof to);
  return r;
}

// The tiles of a thread. Without a configuration there are none.
struct Tiles {
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config;
  alignas(64) uint32_t cell[8][16][16];

  void configure(const void* from) {
    memcpy(&config, from, sizeof config);
    memset(cell, 0, sizeof cell);
  }
  int rows(int tile) const {
    if (config.palette != 1) __builtin_trap();
    return config.rows[tile];
  }
};
inline thread_local Tiles tiles{};

inline void tile_release() { tiles.config.palette = 0; }
inline void tile_zero(int to) {
  tiles.rows(to);
  memset(tiles.cell[to], 0, sizeof tiles.cell[to]);
}
inline void tile_load(int to, const void* base, int64_t stride) {
  tile_zero(to);
  for (int r = 0; r < tiles.rows(to); ++r)
    memcpy(tiles.cell[to][r], static_cast<const char*>(base) + r * stride, tiles.config.bytes[to]);
}
inline void tile_store(int from, void* base, int64_t stride) {
  for (int r = 0; r < tiles.rows(from); ++r)
    memcpy(static_cast<char*>(base) + r * stride, tiles.cell[from][r], tiles.config.bytes[from]);
}
// As the instruction: numbers below the normal ones are 0.
inline float normal(uint32_t bits) {
  if (!(bits & 0x7f800000)) bits &= 0x80000000;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline void tile_product(int to, int a, int b) {
  for (int r = 0; r < tiles.rows(to); ++r)
    for (int k = 0; k < tiles.rows(b); ++k)
      for (int c = 0; c < tiles.config.bytes[to] / 4; ++c) {
        const uint32_t x = tiles.cell[a][r][k], y = tiles.cell[b][k][c];
        float sum = normal(tiles.cell[to][r][c]);
        sum += normal(x << 16) * normal(y << 16);
        sum += normal(x & 0xffff0000) * normal(y & 0xffff0000);
        memcpy(&tiles.cell[to][r][c], &sum, sizeof sum);
      }
}

}  // namespace emulated

#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(x, rounding) emulated::cvtps_ph<(rounding)>(x)
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4(a, b, which) emulated::shuffle_f32x4<(which)>(a, b)
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) emulated::tiles.configure(from)
#define _tile_release emulated::tile_release
#define _tile_zero emulated::tile_zero
#define _tile_loadd emulated::tile_load
#define _tile_stored emulated::tile_store
#define _tile_dpbf16ps emulated::tile_product
