// What every source of the kernels needs from its compiler, and the little that all instruction sets share.
//
// Only declarations and plain types: a function defined here would be compiled under several flags, and the
// linker might keep the copy that an older CPU cannot run. For the same reason nothing in this folder uses
// <algorithm>.
#pragma once
#include <math.h>
#include <string.h>

#include <cstdint>

#include "kernels.h"

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#define ATTN_INLINE __forceinline
#define ATTN_NOINLINE __declspec(noinline)
#define ATTN_UNROLL
#if defined(_M_ARM64)
#define ATTN_PREFETCH(address) __prefetch(address)
#define ATTN_PREFETCH_FAR(address) __prefetch(address)
#else
#define ATTN_PREFETCH(address) _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0)
#define ATTN_PREFETCH_FAR(address) _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T1)
#endif
#elif defined(__clang__)
#define ATTN_INLINE inline __attribute__((always_inline))
#define ATTN_NOINLINE __attribute__((noinline))
#define ATTN_UNROLL _Pragma("unroll")
#define ATTN_PREFETCH(address) __builtin_prefetch(address)
#define ATTN_PREFETCH_FAR(address) __builtin_prefetch(address, 0, 2)
#else
#define ATTN_INLINE inline __attribute__((always_inline))
#define ATTN_NOINLINE __attribute__((noinline))
#define ATTN_UNROLL _Pragma("GCC unroll 32")
#define ATTN_PREFETCH(address) __builtin_prefetch(address)
#define ATTN_PREFETCH_FAR(address) __builtin_prefetch(address, 0, 2)
#endif

// ATTN_PREFETCH: into the first cache. ATTN_PREFETCH_FAR: into the second, where more can be under way.

namespace attn::cpu {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// Memory of this thread, 64-byte aligned, kept between calls; what it held is lost where it has to grow.
void* scratch(size_t bytes);
// The same for what the units of one call share: asked for by the thread that makes the call.
void* call_scratch(size_t bytes);

// body(context, i) once for every i in [0, n), on torch's threads. Threads take the next free unit, so the
// order of starting is that of i (put long units first) and a unit may not depend on which thread runs it.
// `work` is the count of multiplications of all units together: little work stays on this thread.
void run_units(int64_t n, double work, void (*body)(void*, int64_t), void* context);

}  // namespace attn::cpu
