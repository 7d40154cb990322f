// The primitives as PTX, and the launch of a kernel on a stream. Included by prim.cuh alone.
#pragma once
#include <cuda_runtime.h>

#include <atomic>
#include <type_traits>

namespace attn::cuda::prim {

ATTN_DEV uint32_t tid() { return threadIdx.x; }
ATTN_DEV uint32_t lane() { return threadIdx.x & 31; }
ATTN_DEV uint32_t bid_x() { return blockIdx.x; }
ATTN_DEV uint32_t bid_y() { return blockIdx.y; }
ATTN_DEV uint32_t bid_z() { return blockIdx.z; }

ATTN_DEV uint32_t smem_base() {
  extern __shared__ __align__(128) unsigned char attn_smem[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(attn_smem));
}

template <class T>
ATTN_DEV T lds(uint32_t a) {
  if constexpr (sizeof(T) == 16) {
    u32x4 v;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(a)
                 : "memory");
    return bit_cast<T>(v);
  } else if constexpr (sizeof(T) == 8) {
    u32x2 v;
    asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(a) : "memory");
    return bit_cast<T>(v);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(a) : "memory");
    return bit_cast<T>(v);
  } else if constexpr (sizeof(T) == 2) {
    uint16_t v;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(v) : "r"(a) : "memory");
    return bit_cast<T>(v);
  } else {
    static_assert(sizeof(T) == 1);
    uint32_t v;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(a) : "memory");
    return bit_cast<T>(static_cast<uint8_t>(v));
  }
}

template <class T>
ATTN_DEV void sts(uint32_t a, T value) {
  if constexpr (sizeof(T) == 16) {
    const u32x4 v = bit_cast<u32x4>(value);
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    const u32x2 v = bit_cast<u32x2>(value);
    asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(a), "r"(v.x), "r"(v.y) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(a), "r"(bit_cast<uint32_t>(value)) : "memory");
  } else if constexpr (sizeof(T) == 2) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(a), "h"(bit_cast<uint16_t>(value)) : "memory");
  } else {
    static_assert(sizeof(T) == 1);
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(a), "r"(uint32_t(bit_cast<uint8_t>(value))) : "memory");
  }
}

// Through the read-only path. __ldg knows the built-in types alone.
template <class T>
ATTN_DEV T ldg(const T* p) {
  if constexpr (sizeof(T) == 16) return bit_cast<T>(__ldg(reinterpret_cast<const uint4*>(p)));
  if constexpr (sizeof(T) == 8) return bit_cast<T>(__ldg(reinterpret_cast<const uint2*>(p)));
  if constexpr (sizeof(T) == 4) return bit_cast<T>(__ldg(reinterpret_cast<const uint32_t*>(p)));
  if constexpr (sizeof(T) == 2) return bit_cast<T>(__ldg(reinterpret_cast<const uint16_t*>(p)));
  if constexpr (sizeof(T) == 1) return bit_cast<T>(__ldg(reinterpret_cast<const uint8_t*>(p)));
}

template <class T>
ATTN_DEV void stg(T* p, T value) {
  if constexpr (sizeof(T) == 16)
    *reinterpret_cast<uint4*>(p) = bit_cast<uint4>(value);
  else if constexpr (sizeof(T) == 8)
    *reinterpret_cast<uint2*>(p) = bit_cast<uint2>(value);
  else
    *p = value;
}

ATTN_DEV void cp_async_16(uint32_t to, const void* from, int valid_bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid_bytes)
               : "memory");
}
ATTN_DEV void cp_async_8(uint32_t to, const void* from, int valid_bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(valid_bytes)
               : "memory");
}
ATTN_DEV void cp_async_4(uint32_t to, const void* from, int valid_bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid_bytes)
               : "memory");
}
ATTN_DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
ATTN_DEV void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

ATTN_DEV void ldmatrix_x4(uint32_t (&r)[4], uint32_t a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a)
               : "memory");
}
ATTN_DEV void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a)
               : "memory");
}

template <class T>
ATTN_DEV void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, fp16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}
ATTN_DEV void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <class T>
ATTN_DEV T shfl_xor(T v, int mask) {
  return bit_cast<T>(__shfl_xor_sync(~0u, bit_cast<uint32_t>(v), mask));
}
template <class T>
ATTN_DEV T shfl_idx(T v, int from) {
  return bit_cast<T>(__shfl_sync(~0u, bit_cast<uint32_t>(v), from));
}
ATTN_DEV bool vote_any(bool v) { return __any_sync(~0u, v) != 0; }
ATTN_DEV void sync_warp() { __syncwarp(); }
ATTN_DEV void sync_threads() { __syncthreads(); }

ATTN_DEV float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ATTN_DEV float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ATTN_DEV float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ATTN_DEV float tanh(float x) { return ::tanhf(x); }

template <class T>
ATTN_DEV uint32_t pack2(float low, float high) {
  uint32_t r;
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
ATTN_DEV float to_float(bf16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
ATTN_DEV float to_float(fp16 v) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.bits));
  return r;
}
ATTN_DEV float to_float(float v) { return v; }
template <class T>
ATTN_DEV T from_float(float v) {
  if constexpr (std::is_same_v<T, float>)
    return v;
  else
    return T{static_cast<uint16_t>(pack2<T>(v, 0.f))};
}
template <class T>
ATTN_DEV void unpack2(uint32_t v, float& low, float& high) {
  low = to_float(T{static_cast<uint16_t>(v)});
  high = to_float(T{static_cast<uint16_t>(v >> 16)});
}
ATTN_DEV uint32_t to_tf32(float v) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
}
ATTN_DEV uint32_t mul_hi_u32(uint32_t a, uint32_t b) { return __umulhi(a, b); }
ATTN_DEV uint32_t anew(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

// More than 48 KB of shared memory is to be asked for, once per kernel and device.
template <class Kernel>
const char* opt_in_to_shared_memory() {
  if constexpr (Kernel::kSmem <= 48 * 1024) return "";
  static std::atomic<uint64_t> done{0};
  int device = 0;
  if (cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return cudaGetErrorString(e);
  const uint64_t bit = uint64_t(1) << (device & 63);
  if (device < 64 && (done.load(std::memory_order_relaxed) & bit)) return "";
  if (cudaError_t e =
          cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::kSmem);
      e != cudaSuccess) {
    cudaGetLastError();  // or the next launch would report it again
    return cudaGetErrorString(e);
  }
  done.fetch_or(bit, std::memory_order_relaxed);
  return "";
}

template <class Kernel>
const char* launch(const typename Kernel::Params& params, Grid grid, void* stream) {
  static_assert(sizeof(typename Kernel::Params) <= 4096 &&
                std::is_trivially_copyable_v<typename Kernel::Params>);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return "";
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    return "the grid has more blocks than a launch can have";
  if (const char* error = opt_in_to_shared_memory<Kernel>(); *error) return error;
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                    static_cast<unsigned>(grid.z));
  entry<Kernel><<<blocks, Kernel::kThreads, Kernel::kSmem, static_cast<cudaStream_t>(stream)>>>(params);
  const cudaError_t e = cudaGetLastError();
  return e == cudaSuccess ? "" : cudaGetErrorString(e);
}

}  // namespace attn::cuda::prim
