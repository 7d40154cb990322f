// What every primitive does with given bits, as JSON on stdout. The same text runs on a GPU and in the
// emulator:
//
//   nvcc -std=c++17 -gencode arch=compute_80,code=compute_80 tests/cuda_device/calibrate.cu -o calibrate
//   ./calibrate > tests/data/cuda-primitives.json
//
// tests/test_cuda_calibration.py holds the emulator's answers against arithmetic done in Python, and against
// that file where it exists: bit for bit where a case is exact, within the given bound elsewhere.
#include <cstdio>
#include <string>
#include <vector>

#include "../../csrc/cuda/prim.cuh"
#if !defined(__CUDACC__)
#include "../cuda_host/emulator/emulator.h"
#endif

using namespace attn::cuda::prim;

namespace {

struct Words {
  const uint32_t* in;
  uint32_t* out;
};

// One warp for all cases: a block of more has barriers, which product_kernel.cuh covers.
struct OneWarp {
  using Params = Words;
  static constexpr int kThreads = 32, kSmem = 4096, kMinBlocks = 1;
};

struct Place : OneWarp {
  static constexpr int kIn = 0, kOut = 64;
  ATTN_DEV static void run(const Words& w) {
    stg(w.out + tid(), lane() | tid() << 8);
    stg(w.out + 32 + tid(), bid_x() | bid_y() << 8 | bid_z() << 16);
  }
};

// Every width of shared load and store: written as words, read as T; written as T, read as words.
template <class T>
struct Shared : OneWarp {
  static constexpr int kIn = 32 * 4, kOut = 64 * 4;
  ATTN_DEV static void run(const Words& w) {
    const uint32_t s = smem_base();
    constexpr int kCount = 16 / int(sizeof(T));
    for (int i = 0; i < 4; ++i) sts<uint32_t>(s + tid() * 16 + uint32_t(i) * 4, ldg(w.in + tid() * 4 + i));
    sync_threads();
    const uint32_t from = s + (31 - tid()) * 16, to = s + 2048 + tid() * 16;
    for (int i = 0; i < kCount; ++i) {
      const uint32_t o = uint32_t(i) * sizeof(T), back = uint32_t(kCount - 1 - i) * sizeof(T);
      sts<T>(to + back, lds<T>(from + o));
    }
    sync_threads();
    for (int i = 0; i < 4; ++i) stg(w.out + tid() * 4 + i, lds<uint32_t>(to + uint32_t(i) * 4));
    stg(reinterpret_cast<u32x4*>(w.out + 128) + tid(),
        ldg(reinterpret_cast<const u32x4*>(w.in) + (tid() ^ 5)));
  }
};

// Lane l copies with l % (kBytes + 1) valid bytes.
template <int kBytes>
struct Copy : OneWarp {
  static constexpr int kIn = 32 * 4, kOut = 32 * 4;
  ATTN_DEV static void run(const Words& w) {
    const uint32_t to = smem_base() + tid() * 16;
    const int valid = int(lane()) % (kBytes + 1);
    sts<u32x4>(to, u32x4{1, 2, 3, 4});
    if constexpr (kBytes == 16) cp_async_16(to, w.in + tid() * 4, valid);
    if constexpr (kBytes == 8) cp_async_8(to, w.in + tid() * 4, valid);
    if constexpr (kBytes == 4) cp_async_4(to, w.in + tid() * 4, valid);
    cp_async_commit();
    cp_async_wait<0>();
    stg(reinterpret_cast<u32x4*>(w.out) + tid(), lds<u32x4>(to));
  }
};

// Rows of eight 16-bit elements, taken in another order than they lie in.
template <bool kTrans>
struct Matrix : OneWarp {
  static constexpr int kIn = 32 * 4, kOut = 32 * 4;
  ATTN_DEV static void run(const Words& w) {
    const uint32_t s = smem_base();
    sts<u32x4>(s + tid() * 16, ldg(reinterpret_cast<const u32x4*>(w.in) + tid()));
    sync_threads();
    uint32_t r[4];
    const uint32_t row = s + (tid() * 7 + 3) % 32 * 16;
    if constexpr (kTrans)
      ldmatrix_x4_trans(r, row);
    else
      ldmatrix_x4(r, row);
    for (int i = 0; i < 4; ++i) stg(w.out + tid() * 4 + i, r[i]);
  }
};

enum class Kind { bf16, fp16, tf32 };

// in: per lane 4 words of a, 2 of b, 4 floats of c.
template <Kind kKind>
struct Mma : OneWarp {
  static constexpr int kIn = 32 * 10, kOut = 32 * 4;
  ATTN_DEV static void run(const Words& w) {
    const uint32_t* in = w.in + tid() * 10;
    uint32_t a[4];
    float d[4];
    for (int i = 0; i < 4; ++i) a[i] = ldg(in + i);
    const uint32_t b0 = ldg(in + 4), b1 = ldg(in + 5);
    for (int i = 0; i < 4; ++i) d[i] = bit_cast<float>(ldg(in + 6 + i));
    if constexpr (kKind == Kind::bf16) mma_m16n8k16<bf16>(d, a, b0, b1);
    if constexpr (kKind == Kind::fp16) mma_m16n8k16<fp16>(d, a, b0, b1);
    if constexpr (kKind == Kind::tf32) mma_m16n8k8_tf32(d, a, b0, b1);
    for (int i = 0; i < 4; ++i) stg(w.out + tid() * 4 + i, bit_cast<uint32_t>(d[i]));
  }
};

struct Shuffle : OneWarp {
  static constexpr int kIn = 32, kOut = 32 * 8;
  ATTN_DEV static void run(const Words& w) {
    const uint32_t v = ldg(w.in + tid());
    stg(w.out + tid(), shfl_xor(v, 1));
    stg(w.out + 32 + tid(), shfl_xor(v, 2));
    stg(w.out + 64 + tid(), shfl_xor(v, 16));
    stg(w.out + 96 + tid(), shfl_idx(v, 3));
    stg(w.out + 128 + tid(), shfl_idx(v, int(31 - lane())));
    stg(w.out + 160 + tid(), bit_cast<uint32_t>(shfl_xor(bit_cast<float>(v), 4)));
    stg(w.out + 192 + tid(), uint32_t(vote_any(lane() == 7)));
    stg(w.out + 224 + tid(), uint32_t(vote_any(lane() == 32)));
  }
};

// out[i] = F(in[i]), 8 words a lane.
template <class F>
struct Map : OneWarp {
  static constexpr int kIn = 256, kOut = 256;
  ATTN_DEV static void run(const Words& w) {
    for (uint32_t i = tid(); i < 256; i += 32) stg(w.out + i, F::of(ldg(w.in + i)));
  }
};
// out[i] = F(in[2 i], in[2 i + 1])
template <class F>
struct Map2 : OneWarp {
  static constexpr int kIn = 512, kOut = 256;
  ATTN_DEV static void run(const Words& w) {
    for (uint32_t i = tid(); i < 256; i += 32)
      stg(w.out + i, F::of(ldg(w.in + 2 * i), ldg(w.in + 2 * i + 1)));
  }
};

ATTN_DEV float f(uint32_t u) { return bit_cast<float>(u); }
ATTN_DEV uint32_t u(float v) { return bit_cast<uint32_t>(v); }

struct Ex2 {
  ATTN_DEV static uint32_t of(uint32_t x) { return u(ex2(f(x))); }
};
struct Lg2 {
  ATTN_DEV static uint32_t of(uint32_t x) { return u(lg2(f(x))); }
};
struct Rcp {
  ATTN_DEV static uint32_t of(uint32_t x) { return u(rcp(f(x))); }
};
struct Tanh {
  ATTN_DEV static uint32_t of(uint32_t x) { return u(attn::cuda::prim::tanh(f(x))); }
};
struct Tf32 {
  ATTN_DEV static uint32_t of(uint32_t x) { return to_tf32(f(x)); }
};
template <class T>
struct Pack {
  ATTN_DEV static uint32_t of(uint32_t x, uint32_t y) { return pack2<T>(f(x), f(y)); }
};
template <class T>
struct Round {
  ATTN_DEV static uint32_t of(uint32_t x) { return from_float<T>(f(x)).bits; }
};
template <class T>
struct Unpack {
  ATTN_DEV static uint32_t of(uint32_t which, uint32_t x) {
    float low, high;
    unpack2<T>(x, low, high);
    return u(which & 1 ? high : low);
  }
};
struct MulHi {
  ATTN_DEV static uint32_t of(uint32_t x, uint32_t y) { return mul_hi_u32(x, y); }
};

// ---- Inputs

uint64_t state = 1;
uint32_t random_word() {
  state += 0x9E3779B97F4A7C15ull;
  uint64_t z = state;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return uint32_t((z ^ (z >> 31)) >> 16);
}
uint32_t bits(float v) {
  uint32_t w;
  std::memcpy(&w, &v, 4);
  return w;
}
float small(int range) { return float(int(random_word() % uint32_t(2 * range + 1)) - range); }

uint32_t any(int) { return random_word(); }
// Floats of every size, with the numbers at which rules change.
uint32_t any_float(int i) {
  constexpr uint32_t kSpecial[] = {0x00000000, 0x80000000, 0x7f800000, 0xff800000, 0x7fc00000, 0x00000001,
                                   0x807fffff, 0x00800000, 0x3f800000, 0xbf800000, 0x477fefff, 0x477ff000,
                                   0x38800000, 0x387fffff, 0x33000000, 0x33000001, 0x3f808000, 0x3f818000,
                                   0x3f801000, 0x3f803000, 0x7f7fffff, 0xc2fe0000, 0xc2fc0000, 0x43000000,
                                   0x3f8ff000, 0x3f8ff001};
  constexpr int kCount = int(sizeof kSpecial / sizeof kSpecial[0]);
  return i < kCount ? kSpecial[i] : random_word();
}
uint32_t moderate(int i) { return i < 20 ? any_float(i) : bits(small(1 << 20) * 0x1p-14f); }
uint32_t positive(int i) { return any_float(i) & 0x7fffffff; }
// Sums of these are exact in any order.
uint32_t small_bf16(int i) {
  return i % 10 < 6 ? bits(small(8)) >> 16 | (bits(small(8)) & 0xffff0000) : bits(small(64));
}
uint32_t half_of(float v) {  // of an integer up to 8
  const uint32_t w = bits(v);
  return v == 0 ? 0 : ((w >> 16) & 0x8000) | ((((w >> 13) & 0x3ffff) - (112 << 10)) & 0x7fff);
}
uint32_t small_fp16(int i) {
  return i % 10 < 6 ? half_of(small(8)) | half_of(small(8)) << 16 : bits(small(64));
}
// With bits below those that the unit sees.
uint32_t small_tf32(int i) {
  return i % 10 < 6 ? bits(small(8)) | (random_word() & 0x1fff) : bits(small(64));
}
uint32_t normal_bf16(int i) {
  return i % 10 < 6 ? (random_word() & 0x807f807f) | 0x3f803f80 : bits(small(64) * 0.37f);
}

// ---- One case after another

bool first = true;

void print_words(const char* name, const std::vector<uint32_t>& words, int count) {
  std::printf("\"%s\": [", name);
  for (int i = 0; i < count; ++i) std::printf("%s%u", i ? ", " : "", words[size_t(i)]);
  std::printf("]");
}

void stop(const std::string& said) {
  std::fprintf(stderr, "%s\n", said.c_str());
  std::exit(1);
}

#if defined(__CUDACC__)

void must(cudaError_t e) {
  if (e != cudaSuccess) stop(cudaGetErrorString(e));
}
std::string device() {
  cudaDeviceProp p;
  must(cudaGetDeviceProperties(&p, 0));
  return p.name;
}
template <class Kernel>
void run(const std::vector<uint32_t>& in, std::vector<uint32_t>& out) {
  uint32_t *device_in, *device_out;
  const size_t in_bytes = in.size() * 4, out_bytes = out.size() * 4;
  must(cudaMalloc(&device_in, in_bytes));
  must(cudaMalloc(&device_out, out_bytes));
  must(cudaMemcpy(device_in, in.data(), in_bytes, cudaMemcpyHostToDevice));
  if (const char* said = launch<Kernel>({device_in, device_out}, {1, 1, 1}, nullptr); *said) stop(said);
  must(cudaMemcpy(out.data(), device_out, out_bytes, cudaMemcpyDeviceToHost));
  must(cudaFree(device_in));
  must(cudaFree(device_out));
}

#else

std::string device() { return "emulator"; }
template <class Kernel>
void run(const std::vector<uint32_t>& in, std::vector<uint32_t>& out) {
  emu::Memory& memory = emu::memory();
  memory.clear();
  memory.add("in", in.data(), 4, {{int64_t(in.size()), 1}}, emu::Access::Input);
  memory.add("out", out.data(), 4, {{int64_t(out.size()), 1}}, emu::Access::Output);
  if (const char* said = launch<Kernel>({in.data(), out.data()}, {1, 1, 1}, nullptr); *said) stop(said);
  if (Kernel::kOut == int(out.size()) && !memory.gaps().ok()) stop(memory.gaps().message);
}

#endif

// `bound`: relative error that is allowed, 0 for bit for bit.
template <class Kernel>
void show(const char* name, uint32_t (*draw)(int), double bound = 0) {
  std::vector<uint32_t> in(size_t(Kernel::kIn) + 4), out(size_t(Kernel::kOut));
  for (size_t i = 0; i < in.size(); ++i) in[i] = draw(int(i));
  run<Kernel>(in, out);
  std::printf("%s\n\"%s\": {\"bound\": %g, ", first ? "" : ",", name, bound);
  print_words("in", in, Kernel::kIn);
  std::printf(", ");
  print_words("out", out, Kernel::kOut);
  std::printf("}");
  first = false;
}

}  // namespace

int main() {
  std::printf("{\"device\": \"%s\", \"cases\": {", device().c_str());
  show<Place>("place", any);
  show<Shared<uint8_t>>("shared_1", any);
  show<Shared<uint16_t>>("shared_2", any);
  show<Shared<uint32_t>>("shared_4", any);
  show<Shared<u32x2>>("shared_8", any);
  show<Shared<u32x4>>("shared_16", any);
  show<Copy<4>>("copy_4", any);
  show<Copy<8>>("copy_8", any);
  show<Copy<16>>("copy_16", any);
  show<Matrix<false>>("ldmatrix", any);
  show<Matrix<true>>("ldmatrix_trans", any);
  show<Mma<Kind::bf16>>("mma_bf16", small_bf16);
  show<Mma<Kind::fp16>>("mma_fp16", small_fp16);
  show<Mma<Kind::tf32>>("mma_tf32", small_tf32);
  show<Mma<Kind::bf16>>("mma_bf16_rounded", normal_bf16, 0x1p-20);  // of the sum of magnitudes
  show<Shuffle>("shuffle", any);
  show<Map<Ex2>>("ex2", moderate, 0x1p-21);
  show<Map<Lg2>>("lg2", positive, 0x1p-20);
  show<Map<Rcp>>("rcp", any_float, 0x1p-22);
  show<Map<Tanh>>("tanh", moderate, 0x1p-21);
  show<Map<Tf32>>("to_tf32", any_float);
  show<Map<Round<bf16>>>("round_bf16", any_float);
  show<Map<Round<fp16>>>("round_fp16", any_float);
  show<Map2<Pack<bf16>>>("pack_bf16", any_float);
  show<Map2<Pack<fp16>>>("pack_fp16", moderate);
  show<Map2<Unpack<bf16>>>("unpack_bf16", any);
  show<Map2<Unpack<fp16>>>("unpack_fp16", any);
  show<Map2<MulHi>>("mul_hi", any);
  std::printf("\n}}\n");
  return 0;
}
