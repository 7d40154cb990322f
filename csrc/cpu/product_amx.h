// Products of small matrices on AMX's tiles, in place of the register block of product.h.
//
// A tile has up to 16 rows of 64 bytes. A block is two by two of them: accumulators 0 and 1 above 2 and 3,
// their left operands 4 and 5 (rows of pairs, from kAlongRows), their right ones 6 and 7 (rows of columns of
// pairs, which is how right_operand, pack_columns and columns_of lay them out). Depths are multiples of
// kDepth: operands are filled up with zeros. A block of fewer than kRows rows needs a configuration of its
// own, and then the one of all others comes back.
#pragma once
#include "operands.h"

namespace attn::cpu::ATTN_ISA {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};  // of a row
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
struct TileConfigs {
  TileConfig of_rows[kRows + 1];

  constexpr TileConfigs() : of_rows() {
    for (int n = 1; n < kRows; ++n) {
      uint8_t* rows = of_rows[n].rows;
      if (n < 16)
        rows[0] = rows[1] = rows[4] = static_cast<uint8_t>(n);
      else if (n > 16)
        rows[2] = rows[3] = rows[5] = static_cast<uint8_t>(n - 16);
    }
  }
};
constexpr TileConfigs kTileConfigs;

// Between these the tiles of this thread are ours. Others use them too.
ATTN_INLINE void take_tiles() { _tile_loadconfig(&kTileConfigs.of_rows[kRows]); }
ATTN_INLINE void return_tiles() { _tile_release(); }

// gcc does not know that tiles are loaded from memory.
ATTN_INLINE void settle_memory() {
#if defined(__GNUC__)
  __asm__ volatile("" ::: "memory");
#endif
}

// C (M x N tiles, of which the last ones may have fewer rows) = A B, or += where init is false.
template <int M, int N>
ATTN_NOINLINE void block(int64_t depth, const Cell* a, int64_t as, const Cell* b, int64_t bs, Real* c,
                         int64_t cs, bool init) {
  const int64_t size = sizeof(Cell), a_step = as * size, b_step = bs * size, c_step = cs * size;
  settle_memory();
  if (init) {
    _tile_zero(0);
    if (N > 1) _tile_zero(1);
    if (M > 1) _tile_zero(2);
    if (M > 1 && N > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, c, c_step);
    if (N > 1) _tile_loadd(1, c + kWidth, c_step);
    if (M > 1) _tile_loadd(2, c + 16 * cs, c_step);
    if (M > 1 && N > 1) _tile_loadd(3, c + 16 * cs + kWidth, c_step);
  }
  for (int64_t k = 0; k < depth; k += kDepth) {
    _tile_loadd(6, b, b_step);
    _tile_loadd(4, a, a_step);
    _tile_dpbf16ps(0, 4, 6);
    if (N > 1) {
      _tile_loadd(7, b + kWidth, b_step);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (M > 1) {
      _tile_loadd(5, a + 16 * as, a_step);
      _tile_dpbf16ps(2, 5, 6);
      if (N > 1) _tile_dpbf16ps(3, 5, 7);
    }
    a += kDepth;
    b += kDepth * bs;
  }
  _tile_stored(0, c, c_step);
  if (N > 1) _tile_stored(1, c + kWidth, c_step);
  if (M > 1) _tile_stored(2, c + 16 * cs, c_step);
  if (M > 1 && N > 1) _tile_stored(3, c + 16 * cs + kWidth, c_step);
  settle_memory();
}

// One block; see product.h.
template <Side>
ATTN_INLINE void multiply_block(int64_t rows, int64_t vectors, int64_t depth, const Cell* a, int64_t as,
                                const Cell* b, int64_t bs, Real* c, int64_t cs, bool init, Real factor) {
  const bool whole = rows % 16 == 0;
  if (!whole) _tile_loadconfig(&kTileConfigs.of_rows[rows]);
  (rows > 16     ? vectors > 1 ? block<2, 2> : block<2, 1>
   : vectors > 1 ? block<1, 2>
                 : block<1, 1>)(depth, a, as, b, bs, c, cs, init);
  if (!whole) _tile_loadconfig(&kTileConfigs.of_rows[kRows]);
  if (!init || factor == 1) return;
  const Vec times = set(factor);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < vectors * kWidth; j += kWidth)
      store(c + r * cs + j, mul(load(c + r * cs + j), times));
}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
