// AVX-512 that multiplies pairs of bf16 and adds them up in float: for calls in bf16; avx512 serves the
// others. Numbers below the normal ones count as 0 in these products.
#pragma once
#define ATTN_PAIRS
#include "vec_avx512.h"

namespace attn::cpu::ATTN_ISA {
namespace {

// A pair of bf16, the one that comes first in memory in the low half.
using Cell = uint32_t;
using Cells = __m512i;
constexpr int kPerCell = 2;

ATTN_INLINE Cells load_cells(const void* p) { return _mm512_loadu_si512(p); }
ATTN_INLINE void store_cells(Cell* p, Cells x) { _mm512_storeu_si512(p, x); }
ATTN_INLINE Cells broadcast(const Cell* p) {
  int pair;
  memcpy(&pair, p, sizeof pair);  // rows in place are memory of another type
  return _mm512_set1_epi32(pair);
}
ATTN_INLINE __m512bh as_halves(Cells x) {  // the compilers agree on no cast
  __m512bh halves;
  memcpy(&halves, &x, sizeof x);
  return halves;
}
ATTN_INLINE Vec multiply_add(Cells a, Cells b, Vec c) {
  return _mm512_dpbf16_ps(c, as_halves(a), as_halves(b));
}
ATTN_INLINE Vec as_numbers(Cells x) { return _mm512_castsi512_ps(x); }
ATTN_INLINE Cells as_cells(Vec x) { return _mm512_castps_si512(x); }

// Pair i: first[i], second[i].
ATTN_INLINE Cells interleave(const Bf16* first, const Bf16* second) {
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second));
  return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}
// Rounds. Pairs of neighbouring lanes, of x and then of y.
ATTN_INLINE Cells pair_neighbours(Vec x, Vec y) {
  const __m512bh halves = _mm512_cvtne2ps_pbh(y, x);
  Cells pairs;
  memcpy(&pairs, &halves, sizeof pairs);
  return pairs;
}
// Rounds. Pair i: x and y of lane i.
ATTN_INLINE Cells pair_lanes(Vec x, Vec y) {
  alignas(64) static const uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                 21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_loadu_si512(order), pair_neighbours(x, y));
}
#ifdef ATTN_TILES
// The same with halves rounded up, in fewer steps on the cores that have tiles; a NaN may be lost.
ATTN_INLINE Cells pair_exponentials(Vec x, Vec y) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i first = _mm512_add_epi32(_mm512_castps_si512(x), half);
  const __m512i second = _mm512_add_epi32(_mm512_castps_si512(y), half);
  return _mm512_mask_mov_epi16(_mm512_srli_epi32(first, 16), 0xaaaaaaaa, second);
}
#else
ATTN_INLINE Cells pair_exponentials(Vec x, Vec y) { return pair_lanes(x, y); }
#endif

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
