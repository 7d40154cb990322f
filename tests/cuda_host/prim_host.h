// The primitives as calls into the emulator, each with the place in the kernel it comes from.
#pragma once
#include <cmath>
#include <type_traits>

#include "emulator/device.h"
#include "emulator/numbers.h"

// Only as default arguments themselves do the builtins mean the caller's line.
#define ATTN_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define ATTN_HERE \
  ::emu::Loc { file, line }

namespace attn::cuda::prim {

ATTN_DEV uint32_t tid() { return emu::tid(); }
ATTN_DEV uint32_t lane() { return emu::tid() & 31; }
ATTN_DEV uint32_t bid_x() { return uint32_t(emu::block_index().x); }
ATTN_DEV uint32_t bid_y() { return uint32_t(emu::block_index().y); }
ATTN_DEV uint32_t bid_z() { return uint32_t(emu::block_index().z); }
ATTN_DEV uint32_t smem_base() { return emu::smem_base(); }

template <class T>
T lds(uint32_t a, ATTN_PLACE) {
  T v;
  emu::shared_read(a, &v, sizeof v, ATTN_HERE);
  return v;
}
template <class T>
void sts(uint32_t a, T v, ATTN_PLACE) {
  emu::shared_write(a, &v, sizeof v, ATTN_HERE);
}
template <class T>
T ldg(const T* p, ATTN_PLACE) {
  T v;
  emu::global_read(p, &v, sizeof v, ATTN_HERE);
  return v;
}
template <class T>
void stg(T* p, T v, ATTN_PLACE) {
  emu::global_write(p, &v, sizeof v, ATTN_HERE);
}

ATTN_DEV void cp_async_16(uint32_t to, const void* from, int valid_bytes, ATTN_PLACE) {
  emu::cp_async(to, from, 16, valid_bytes, ATTN_HERE);
}
ATTN_DEV void cp_async_8(uint32_t to, const void* from, int valid_bytes, ATTN_PLACE) {
  emu::cp_async(to, from, 8, valid_bytes, ATTN_HERE);
}
ATTN_DEV void cp_async_4(uint32_t to, const void* from, int valid_bytes, ATTN_PLACE) {
  emu::cp_async(to, from, 4, valid_bytes, ATTN_HERE);
}
ATTN_DEV void cp_async_commit(ATTN_PLACE) { emu::cp_async_commit(ATTN_HERE); }
template <int kPending>
void cp_async_wait(ATTN_PLACE) {
  emu::cp_async_wait(kPending, ATTN_HERE);
}

ATTN_DEV void ldmatrix_x4(uint32_t (&r)[4], uint32_t a, ATTN_PLACE) {
  emu::ldmatrix_x4(r, a, false, ATTN_HERE);
}
ATTN_DEV void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t a, ATTN_PLACE) {
  emu::ldmatrix_x4(r, a, true, ATTN_HERE);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, ATTN_PLACE) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  const uint32_t b[2] = {b0, b1};
  emu::mma(d, a, b, std::is_same_v<T, bf16> ? emu::Element::bf16 : emu::Element::fp16, ATTN_HERE);
}
ATTN_DEV void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, ATTN_PLACE) {
  const uint32_t b[2] = {b0, b1};
  emu::mma(d, a, b, emu::Element::tf32, ATTN_HERE);
}

template <class T>
T shfl_xor(T v, int mask, ATTN_PLACE) {
  return bit_cast<T>(emu::shfl_xor(bit_cast<uint32_t>(v), mask, ATTN_HERE));
}
template <class T>
T shfl_idx(T v, int from, ATTN_PLACE) {
  return bit_cast<T>(emu::shfl_idx(bit_cast<uint32_t>(v), from, ATTN_HERE));
}
ATTN_DEV bool vote_any(bool v, ATTN_PLACE) { return emu::vote_any(v, ATTN_HERE); }
ATTN_DEV void sync_warp(ATTN_PLACE) { emu::sync_warp(ATTN_HERE); }
ATTN_DEV void sync_threads(ATTN_PLACE) { emu::sync_threads(ATTN_HERE); }

ATTN_DEV float ex2(float x) { return emu::ex2(x); }
ATTN_DEV float lg2(float x) { return emu::lg2(x); }
ATTN_DEV float rcp(float x) { return emu::rcp(x); }
ATTN_DEV float tanh(float x) { return std::tanh(x); }

ATTN_DEV float to_float(bf16 v) { return emu::bf16_to_float(v.bits); }
ATTN_DEV float to_float(fp16 v) { return emu::fp16_to_float(v.bits); }
ATTN_DEV float to_float(float v) { return v; }
template <class T>
T from_float(float v) {
  if constexpr (std::is_same_v<T, float>)
    return v;
  else
    return T{std::is_same_v<T, bf16> ? emu::float_to_bf16(v) : emu::float_to_fp16(v)};
}
template <class T>
uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}
template <class T>
void unpack2(uint32_t v, float& low, float& high) {
  low = to_float(T{uint16_t(v)});
  high = to_float(T{uint16_t(v >> 16)});
}
ATTN_DEV uint32_t to_tf32(float v) { return emu::float_to_tf32(v); }
ATTN_DEV uint32_t mul_hi_u32(uint32_t a, uint32_t b) { return uint32_t((uint64_t(a) * b) >> 32); }
ATTN_DEV uint32_t anew(uint32_t x) { return x; }

// The whole grid, before it returns. The message lasts until the next launch.
template <class Kernel>
const char* launch(const typename Kernel::Params& params, Grid grid, void*) {
  using Params = typename Kernel::Params;
  static_assert(sizeof(Params) <= 4096 && std::is_trivially_copyable_v<Params>);
  const auto kernel = [](const void* p) { Kernel::run(*static_cast<const Params*>(p)); };
  return emu::run({grid.x, grid.y, grid.z}, Kernel::kThreads, Kernel::kSmem, kernel, &params);
}

}  // namespace attn::cuda::prim

#undef ATTN_PLACE
#undef ATTN_HERE
