// Multiply-adds in registers alone: what the arithmetic of this CPU allows, for benchmarks to measure
// themselves by.
#pragma once
#include "operands.h"

namespace attn::cpu::ATTN_ISA {
namespace {

// Runs `rounds` of multiply-adds of cells that wait for no memory and not for each other; returns how many
// operations they are.
double multiply_adds(int64_t rounds) {
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
}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
