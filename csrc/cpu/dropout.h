// Dropout: the bits of attn/rng.py, as words of 64 queries.
#pragma once
#include "masks.h"

namespace attn::cpu::ATTN_ISA {
namespace {

struct Dropout {
  bool on;
  uint32_t key[2], offset, head;
  uint64_t threshold;  // kept where the word is at least this; 2^32 at p = 1
  Real inverse;        // 1 / (1 - p); 0 at p = 1

  ATTN_INLINE Dropout(const Problem& p, const Sequence& s, int64_t head_index) {
    on = p.dropout_p > 0;
    inverse = 1;
    if (!on) return;
    key[0] = static_cast<uint32_t>(p.rng[0]);
    key[1] = static_cast<uint32_t>(static_cast<uint64_t>(p.rng[0]) >> 32);
    offset = static_cast<uint32_t>(p.rng[1]);
    head = static_cast<uint32_t>(s.number * p.Hq + head_index);
    threshold = static_cast<uint64_t>(nearbyint(p.dropout_p * 4294967296.0));
    inverse = p.dropout_p < 1 ? static_cast<Real>(1 / (1 - p.dropout_p)) : 0;
  }
};

// Four words per counter, in place: Philox4x32-7.
ATTN_INLINE void philox(Words (&c)[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 7; ++round) {
    Words high0, low0, high1, low1;
    multiply(c[0], 0xD2511F53u, high0, low0);
    multiply(c[2], 0xCD9E8D57u, high1, low1);
    c[0] = exclusive_or(exclusive_or(high1, c[1]), words(k0));
    c[1] = low1;
    c[2] = exclusive_or(exclusive_or(high0, c[3]), words(k1));
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Bytes 0 to 3 of x to bytes 0, 2, 4, 6.
ATTN_INLINE uint64_t spread_bytes(uint64_t x) {
  x = (x | x << 16) & 0x0000ffff0000ffffu;
  return (x | x << 8) & 0x00ff00ff00ff00ffu;
}

// kept[j]: bit i set where (q0 + i, k0 + j) is kept. q0 and k0 must be multiples of 16; nq <= kQueries.
// Writes kept up to the next multiple of 16 after nk.
ATTN_NOINLINE void dropout_tile(const Dropout& d, int64_t q0, int64_t nq, int64_t k0, int64_t nk,
                                uint64_t* kept) {
  const int64_t padded = round_up(nk, 16);
  if (d.threshold > 0xffffffffu) {
    for (int64_t j = 0; j < padded; ++j) kept[j] = 0;
    return;
  }
  const auto threshold = static_cast<uint32_t>(d.threshold);
  uint32_t query[32];  // a counter serves queries i and i + 8
  for (int x = 0; x < 32; ++x) query[x] = static_cast<uint32_t>(q0 + x / 8 * 16 + x % 8);
  const int used = static_cast<int>(round_up((nq + 15) / 16 * 8, kWidth));
  for (int64_t j = 0; j < padded; j += 16)
    for (int64_t t = j; t < j + 8; ++t) {
      uint64_t bits[4] = {0, 0, 0, 0};
      for (int x = 0; x < used; x += kWidth) {
        Words c[4] = {load_words(query + x), words(static_cast<uint32_t>(k0 + t)), words(d.head),
                      words(d.offset)};
        philox(c, d.key[0], d.key[1]);
        ATTN_UNROLL
        for (int w = 0; w < 4; ++w) bits[w] |= static_cast<uint64_t>(at_least(c[w], threshold)) << x;
      }
      kept[t] = spread_bytes(bits[0]) | spread_bytes(bits[2]) << 8;
      kept[t + 8] = spread_bytes(bits[1]) | spread_bytes(bits[3]) << 8;
    }
}

// What is both visible and kept, in `kept`.
ATTN_INLINE const uint64_t* both(const uint64_t* seen, int64_t nk, uint64_t* kept) {
  if (seen)
    for (int64_t j = 0; j < nk; ++j) kept[j] &= seen[j];
  return kept;
}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
