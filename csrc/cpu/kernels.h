// What the CPU kernels are to the rest of the library, and what they take from it.
#pragma once
#include "../attention.h"

namespace attn::cpu {

// The kernels of one instruction set. Values that the caller has not checked: none; see attn/backends/cpu.py.
struct Kernels {
  const char* isa;
  void (*forward)(const Problem&, const Weights*);  // m, l and weights only where asked for
  void (*weights)(const Problem&, const Weights&);  // from m, l
  void (*backward)(const Problem&, const Backward&);
  void (*decode)(const Decode&);
  double (*multiply_adds)(int64_t rounds);  // of float; see peak.h
  double (*pair_products)(int64_t rounds);  // the same of pairs of bf16; null where the set has none
};

// The best that this CPU runs, or the one named (as ATTN_CPU_ISA names it); null where it cannot run or is
// not known.
const Kernels* kernels(const char* isa);

// body(context, begin, end) over parts of [0, n) on torch's threads; the kernels' only tie to it.
void parallel_for(int64_t n, void (*body)(void*, int64_t, int64_t), void* context);
int thread_count();

}  // namespace attn::cpu
