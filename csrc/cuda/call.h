// What every kernel of a Problem is given: the problem, and the numbers that the host makes of it once.
#pragma once
#include <cmath>

#include "../attention.h"

namespace attn::cuda {

constexpr double kLog2e = 1.4426950408889634;
constexpr int kFar = 1 << 30;           // more than any position
constexpr int64_t kMostRows = 1 << 29;  // positions, and sums of three of them, are 32-bit numbers
constexpr const char* kTooMany = "the CUDA kernels count to 536870912 queries or keys";

// The widest copy, in bytes, that every row of a tensor allows: 16, 8, 4 or 2.
inline int access_of(const Rows& r, Dtype dtype) {
  const uint64_t size = dtype == Dtype::f32 ? 4 : 2;
  const uint64_t all = reinterpret_cast<uint64_t>(r.data) | size * static_cast<uint64_t>(r.batch) |
                       size * static_cast<uint64_t>(r.head) | size * static_cast<uint64_t>(r.row);
  for (int bytes = 16; bytes > 2; bytes /= 2)
    if (all % static_cast<uint64_t>(bytes) == 0) return bytes;
  return 2;
}

struct Call {
  Problem p;
  float scale;           // of the products
  float unit;            // scale * log2(e): of products that nothing is added to
  float softcap, uncap;  // 0 without one
  float inverse_keep;    // 1 / (1 - dropout_p), 0 at 1
  uint32_t threshold;    // a probability is kept where its word is at least this
  int left, right;       // sides of the band, kFar where unbounded
  bool banded, drops, drops_all;
  int group;  // heads of q that share one of k and v
  int q_access, k_access, v_access, out_access;
  int section;  // heads (of all sequences) whose keys and values stay in the L2 cache together
};

inline int side_of(int64_t n) { return n < 0 ? kFar : static_cast<int>(n < kMostRows ? n : kMostRows); }

inline Call call_of(const Problem& p) {
  Call c{};
  c.p = p;
  c.scale = static_cast<float>(p.scale);
  c.unit = static_cast<float>(p.scale * kLog2e);
  c.softcap = static_cast<float>(p.softcap);
  c.uncap = p.softcap > 0 ? static_cast<float>(1 / p.softcap) : 0.f;
  c.drops = p.dropout_p > 0;
  const double threshold = std::nearbyint(p.dropout_p * 4294967296.0);
  c.drops_all = threshold >= 4294967296.0;
  c.threshold = c.drops_all ? 0 : static_cast<uint32_t>(threshold);
  c.inverse_keep = p.dropout_p < 1 ? static_cast<float>(1 / (1 - p.dropout_p)) : 0.f;
  c.left = side_of(p.left);
  c.right = side_of(p.right);
  c.banded = p.left >= 0 || p.right >= 0;
  c.q_access = access_of(p.q, p.dtype);
  c.k_access = access_of(p.k, p.dtype);
  c.v_access = access_of(p.v, p.dtype);
  c.out_access = access_of(p.out, p.dtype);
  constexpr int64_t kCache = 16 << 20;  // bytes of L2 that keys and values may take
  const int64_t pair = p.S * (p.D + p.Dv) * (p.dtype == Dtype::f32 ? 4 : 2),
                group = p.Hkv > 0 ? p.Hq / p.Hkv : 1;
  c.group = static_cast<int>(group);
  const int64_t heads = kCache / (pair > 0 ? pair : 1) * group;
  c.section = static_cast<int>(heads < group ? group : heads < kFar ? heads : kFar);
  return c;
}

// Whether scores are products alone, within lengths and a band: what the light kernels do.
inline bool is_light(const Problem& p) {
  return p.scale > 0 && p.softcap <= 0 && p.dropout_p <= 0 && !p.bias.data && !p.keep.data &&
         !p.alibi_slopes && !p.ids_q && !(p.prefix && (p.left >= 0 || p.right >= 0));
}

}  // namespace attn::cuda
