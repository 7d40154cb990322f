// Dropout: the bits of attn/rng.py. One call of the generator serves the four scores (i, j), (i, j + 8), (i +
// 8, j), (i + 8, j + 8), which one thread holds in an accumulator and in that of the transposed product.
#pragma once
#include "tile.cuh"

namespace attn::cuda {

struct Dropout {
  uint32_t key[2], offset, head, threshold;
  bool on, all;

  ATTN_DEV Dropout(const Call& c, const Sequence& s, int head_index) : on(c.drops), all(c.drops_all) {
    if (!on) return;
    const uint64_t seed = static_cast<uint64_t>(ldg(c.p.rng));
    key[0] = static_cast<uint32_t>(seed);
    key[1] = static_cast<uint32_t>(seed >> 32);
    offset = static_cast<uint32_t>(ldg(c.p.rng + 1));
    head = static_cast<uint32_t>(s.number * static_cast<int>(c.p.Hq) + head_index);
    threshold = c.threshold;
  }

  ATTN_DEV bool keeps(uint32_t word) const { return word >= threshold && !all; }

  // The words of (i, j), (i, j + 8), (i + 8, j), (i + 8, j + 8), where neither i nor j has the bit of 8.
  // Philox4x32-7.
  ATTN_DEV u32x4 words(int i, int j) const {
    u32x4 c{static_cast<uint32_t>(i), static_cast<uint32_t>(j), head, offset};
    uint32_t k0 = key[0], k1 = key[1];
    ATTN_UNROLL
    for (int round = 0; round < 7; ++round) {
      const uint32_t high0 = mul_hi_u32(0xD2511F53u, c.x), low0 = 0xD2511F53u * c.x;
      const uint32_t high1 = mul_hi_u32(0xCD9E8D57u, c.z), low1 = 0xCD9E8D57u * c.z;
      c = {high1 ^ c.y ^ k0, low1, high0 ^ c.w ^ k1, low0};
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return c;
  }
};

// visit(m, n, e, whether it is kept) for the elements of an accumulator whose element [0][0] is that of query
// q0 and key k0, both multiples of 16. kTransposed: its rows are keys.
template <int kM, int kN, bool kTransposed, class Visit>
ATTN_DEV void each_kept(const Dropout& d, int q0, int k0, const Visit& visit) {
  static_assert(kN % 2 == 0);
  ATTN_UNROLL
  for (int m = 0; m < kM; ++m) ATTN_UNROLL
  for (int n = 0; n < kN; n += 2) ATTN_UNROLL
  for (int e = 0; e < 2; ++e) {
    const int row = row_of(m, e), col = col_of(n, e);
    u32x4 w = kTransposed ? d.words(q0 + col, k0 + row) : d.words(q0 + row, k0 + col);
    if (kTransposed) w = {w.x, w.z, w.y, w.w};
    visit(m, n, e, d.keeps(w.x));
    visit(m, n + 1, e, d.keeps(w.y));
    visit(m, n, e + 2, d.keeps(w.z));
    visit(m, n + 1, e + 2, d.keeps(w.w));
  }
}

// 0 where dropped.
template <int kM, int kN>
ATTN_DEV void drop(const Dropout& d, int q0, int k0, float (&p)[kM][kN][4]) {
  each_kept<kM, kN, false>(d, q0, k0, [&](int m, int n, int e, bool kept) {
    if (!kept) p[m][n][e] = 0.f;
  });
}

}  // namespace attn::cuda
