// Multiply-adds in registers alone: what the arithmetic of this CPU allows, for benchmarks to measure
// themselves by.
#pragma once
#include "lanes.h"

namespace attn::cpu::ATTN_ISA {
namespace {

// Runs `rounds` of multiply-adds that wait for no memory and not for each other; returns how many operations
// they are.
double multiply_adds(int64_t rounds) {
  constexpr int kChains = 12;
  Vec acc[kChains];
  ATTN_UNROLL
  for (int i = 0; i < kChains; ++i) acc[i] = set(static_cast<Real>(i));
  const Vec factor = set(static_cast<Real>(0.999)), step = set(static_cast<Real>(0.5));
  for (int64_t r = 0; r < rounds; ++r) {
    ATTN_UNROLL
    for (int i = 0; i < kChains; ++i) acc[i] = fma(acc[i], factor, step);
  }
  Vec total = acc[0];
  for (int i = 1; i < kChains; ++i) total = add(total, acc[i]);
  const volatile Real used = sum(total);  // or the compiler would leave all of it out
  static_cast<void>(used);
  return 2.0 * kChains * kWidth * static_cast<double>(rounds);
}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
