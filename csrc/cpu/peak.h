// Multiply-adds in registers alone: what the arithmetic of this CPU allows, for benchmarks to measure
// themselves by.
#pragma once
#include "product.h"

namespace attn::cpu::ATTN_ISA {
namespace {

// Runs `rounds` of multiply-adds of cells that wait for no memory and not for each other; returns how many
// operations they are.
double multiply_adds(int64_t rounds) {
#ifdef ATTN_TILES
  take_tiles();  // all of them 0
  for (int64_t r = 0; r < rounds; ++r) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  return_tiles();
  return 2.0 * 4 * 16 * kDepth * kWidth * kPerCell * static_cast<double>(rounds);
#else
  constexpr int kChains = 12;
  Vec acc[kChains];
  ATTN_UNROLL
  for (int i = 0; i < kChains; ++i) acc[i] = set(static_cast<Real>(i));
  Cell cell;
  memset(&cell, 0x3c, sizeof cell);  // a small number, whatever a cell is
  const Cells factor = broadcast(&cell);
  for (int64_t r = 0; r < rounds; ++r) {
    ATTN_UNROLL
    for (int i = 0; i < kChains; ++i) acc[i] = multiply_add(factor, factor, acc[i]);
  }
  Vec total = acc[0];
  for (int i = 1; i < kChains; ++i) total = add(total, acc[i]);
  const volatile Real used = sum(total);  // or the compiler would leave all of it out
  static_cast<void>(used);
  return 2.0 * kChains * kWidth * kPerCell * static_cast<double>(rounds);
#endif
}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
