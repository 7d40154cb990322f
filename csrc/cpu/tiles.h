// Units of work: tiles of queries of padded and packed calls, and what they cost.
#pragma once
#include "masks.h"

namespace attn::cpu::ATTN_ISA {
namespace {

template <class T>
ATTN_INLINE T* rows_at(const Rows& r, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(r.data) + batch * r.batch + head * r.head + row * r.row;
}

// Sequence n of a packed call has the tiles from cu_seqlens_q[n] / 64 + n on, which are enough for it
// whatever its length; some are empty.
ATTN_INLINE int64_t first_tile(const Problem& p, int64_t n) { return p.cu_seqlens_q[n] / kQueries + n; }

// Tiles of one head.
ATTN_INLINE int64_t query_tiles(const Problem& p) {
  return p.N > 0 ? first_tile(p, p.N) : p.B * ((p.L + kQueries - 1) / kQueries);
}

struct QueryTile {
  int64_t sequence, head, q0, rows;

  ATTN_INLINE bool beside(const QueryTile& t) const { return sequence == t.sequence && head == t.head; }

  // Unit i: the tiles of a head stand together, its last ones, which see most keys in causal calls, first.
  ATTN_INLINE QueryTile(const Problem& p, int64_t i, int64_t heads) {
    if (p.N > 0) {
      const int64_t tiles = first_tile(p, p.N), tile = tiles - 1 - i % tiles;
      head = i / tiles;
      int64_t low = 0, high = p.N;
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (first_tile(p, middle) <= tile ? low : high) = middle;
      }
      sequence = low;
      q0 = (tile - first_tile(p, low)) * kQueries;
      rows = clamp(p.cu_seqlens_q[low + 1] - p.cu_seqlens_q[low] - q0, 0, kQueries);
    } else {
      const int64_t tiles = (p.L + kQueries - 1) / kQueries, tile = tiles - 1 - i % tiles;
      sequence = i / tiles / heads;
      head = i / tiles % heads;
      q0 = tile * kQueries;
      rows = least<int64_t>(kQueries, p.L - q0);
    }
  }
};

// Of the two products of forward, all pairs counted.
ATTN_INLINE double multiplications(const Problem& p) {
  double pairs = static_cast<double>(p.B * p.L) * static_cast<double>(p.S);
  if (p.N > 0) pairs /= static_cast<double>(p.N);
  return pairs * static_cast<double>(p.Hq) * static_cast<double>(p.D + p.Dv);
}

// Rows of a packed call that belong to no sequence: out 0, m -inf, l 0.
template <class T>
void zero_rest(const Problem& p) {
  if (p.N == 0) return;
  for (int64_t head = 0; head < p.Hq; ++head)
    for (int64_t i = p.cu_seqlens_q[p.N]; i < p.L; ++i) {
      zero_row(p.Dv, rows_at<T>(p.out, 0, head, i));
      if (p.m) static_cast<Real*>(p.m)[head * p.L + i] = -kInfinity;
      if (p.l) static_cast<Real*>(p.l)[head * p.L + i] = 0;
    }
}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
