// The instructions that kernels are written in: the only header with any, and the only one they need for it.
//
// Two implementations of the functions below, by the compiler that reads this:
//   nvcc                prim_ptx.cuh                  inline PTX, sm_80 and later
//   g++ -DATTN_HOST     tests/cuda_host/prim_host.h   calls into an emulator of a block
//
//   tid lane bid_x bid_y bid_z            position of the thread, and of its block
//   smem_base                             shared memory, as a 32-bit address aligned to 128 bytes
//   lds<T> sts<T>                         shared load and store, T of 1, 2, 4, 8 or 16 bytes
//   ldg<T> stg<T>                         global load (of what this launch does not write), and store
//   cp_async_4 cp_async_8 cp_async_16     (to, from, valid_bytes): the rest of the bytes arrive as 0
//   cp_async_commit cp_async_wait<N>      close a group; wait until at most N groups are under way
//   ldmatrix_x4 ldmatrix_x4_trans         four 8x8 matrices; lane 8 j + i gives row i of matrix j
//   mma_m16n8k16<T> mma_m16n8k8_tf32      d += a b, accumulated in float
//   shfl_xor shfl_idx vote_any            across a warp
//   sync_warp sync_threads                barriers of a warp and of the block
//   ex2 lg2 rcp                           approximate, subnormals are 0
//   tanh                                  to a few units in the last place
//   pack2<T> unpack2<T> to_float from_float<T> to_tf32 mul_hi_u32
//   anew                                  x, not known to be x: nothing made of it is kept from before
//   launch<Kernel>(params, grid, stream)  host side; "" or what went wrong
//
// Every function of a warp or of the block is called by all of its threads, on one source line. Kernels hold
// no pointer into shared memory, and no __shared__ array. A kernel is
//   struct Kernel {
//     struct Params { ... };            // plain data, at most 4 KB
//     static constexpr int kThreads;    // of a block
//     static constexpr int kSmem;       // bytes of shared memory
//     static constexpr int kMinBlocks;  // that an SM is to hold
//     ATTN_DEV static void run(const Params&);
//   };
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ATTN_DEV __device__ __forceinline__
#define ATTN_HOST_DEV __host__ __device__
#define ATTN_UNROLL _Pragma("unroll")
#define ATTN_NO_UNROLL _Pragma("unroll 1")
#elif defined(ATTN_HOST)
#define ATTN_DEV inline
#define ATTN_HOST_DEV
#define ATTN_UNROLL
#define ATTN_NO_UNROLL
#else
#error "compile with nvcc, or with -DATTN_HOST for the emulator"
#endif

namespace attn::cuda::prim {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct alignas(8) u32x2 {
  uint32_t x, y;
};
struct alignas(16) u32x4 {
  uint32_t x, y, z, w;
};
struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

template <class To, class From>
ATTN_DEV To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// A flag is no number of bytes.
ATTN_DEV void cp_async_16(uint32_t, const void*, bool) = delete;
ATTN_DEV void cp_async_8(uint32_t, const void*, bool) = delete;
ATTN_DEV void cp_async_4(uint32_t, const void*, bool) = delete;

}  // namespace attn::cuda::prim

#if defined(__CUDACC__)
#include "prim_ptx.cuh"
#else
#include "prim_host.h"
#endif
