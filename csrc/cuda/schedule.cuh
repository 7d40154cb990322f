// Which tile of queries a block works on.
#pragma once
#include "mask.cuh"

namespace attn::cuda {

// Tiles of kRows queries that a head has at most: in a packed call sequence n has those from cu_seqlens_q[n]
// / kRows
// + n on, which are enough for it whatever its length, and behind the last are the rows that belong to none.
template <int kRows>
ATTN_HOST_DEV int64_t tiles_of_head(const Problem& p) {
  return p.N > 0 ? p.L / kRows + p.N + 2 : (p.L + kRows - 1) / kRows;
}
template <int kRows>
int64_t query_blocks(const Problem& p) {
  return tiles_of_head<kRows>(p) * p.Hq * (p.N > 0 ? 1 : p.B);
}

template <int kRows>
struct QueryTile {
  Sequence s;
  int head, q0;
  bool exists;

  // Block x: the heads of a section stand together, of their tiles the last first: in a causal call the
  // longest.
  ATTN_DEV QueryTile(const Call& c, int x) {
    const Problem& p = c.p;
    const int tiles = static_cast<int>(tiles_of_head<kRows>(p));
    const int heads = static_cast<int>(p.Hq), pairs = p.N > 0 ? heads : heads * static_cast<int>(p.B);
    const int section = least(c.section, pairs), sections_before = x / (section * tiles);
    const int in = x % (section * tiles), count = least(section, pairs - sections_before * section);
    const int pair = sections_before * section + in % count;
    head = pair % heads;
    place(p, tiles - 1 - in / count, pair / heads);
    exists = q0 >= 0 && q0 < s.rows;
  }

 private:
  ATTN_DEV static int first_tile(const Problem& p, int n) {
    return cumulative(p.cu_seqlens_q, n, static_cast<int>(p.L)) / kRows + n;
  }

  ATTN_DEV void place(const Problem& p, int tile, int batch) {
    if (p.N == 0) {
      s = sequence_of(p, batch);
      q0 = tile * kRows;
      return;
    }
    int low = 0, high = static_cast<int>(p.N) + 1;  // the rest stands for sequence N
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first_tile(p, middle) <= tile ? low : high) = middle;
    }
    s = low < p.N ? sequence_of(p, low) : rest_of(p);
    q0 = (tile - first_tile(p, low)) * kRows;
  }
};

}  // namespace attn::cuda
