// Which tile of queries, or of keys, a block works on.
#pragma once
#include "mask.cuh"

namespace attn::cuda {

// Tiles of kRows queries (keys) that a head has at most: in a packed call sequence n has those from
// cu_seqlens[n] / kRows + n on, which are enough for it whatever its length, and behind the last are the rows
// that belong to none.
template <int kRows, bool kOfKeys>
ATTN_HOST_DEV int64_t tiles_of_head(const Problem& p) {
  const int64_t rows = kOfKeys ? p.S : p.L;
  return p.N > 0 ? rows / kRows + p.N + 2 : (rows + kRows - 1) / kRows;
}
template <int kRows, bool kOfKeys>
int64_t blocks_of(const Problem& p) {
  return tiles_of_head<kRows, kOfKeys>(p) * (kOfKeys ? p.Hkv : p.Hq) * (p.N > 0 ? 1 : p.B);
}
template <int kRows>
int64_t query_blocks(const Problem& p) {
  return blocks_of<kRows, false>(p);
}
template <int kRows>
int64_t key_blocks(const Problem& p) {
  return blocks_of<kRows, true>(p);
}

template <int kRows, bool kOfKeys>
struct BlockTile {
  Sequence s;
  int head, first;  // the head of k and v, if of keys
  bool exists;

  // Block x: the heads of a section stand together. In a causal call the longest tiles come first: the last
  // ones of queries, the first ones of keys.
  ATTN_DEV BlockTile(const Call& c, int x) {
    const Problem& p = c.p;
    const int tiles = static_cast<int>(tiles_of_head<kRows, kOfKeys>(p));
    const int heads = static_cast<int>(kOfKeys ? p.Hkv : p.Hq),
              pairs = p.N > 0 ? heads : heads * static_cast<int>(p.B);
    const int wanted = kOfKeys ? c.section / c.group : c.section;
    const int section = least(wanted, pairs), sections_before = x / (section * tiles);
    const int in = x % (section * tiles), count = least(section, pairs - sections_before * section);
    const int pair = sections_before * section + in % count;
    head = pair % heads;
    place(p, kOfKeys ? in / count : tiles - 1 - in / count, pair / heads);
    exists = first >= 0 && first < (kOfKeys ? s.key_rows : s.rows);
  }

 private:
  ATTN_DEV static int first_tile(const Problem& p, int n) {
    const int32_t* cumulated = kOfKeys ? p.cu_seqlens_k : p.cu_seqlens_q;
    return cumulative(cumulated, n, static_cast<int>(kOfKeys ? p.S : p.L)) / kRows + n;
  }

  ATTN_DEV void place(const Problem& p, int tile, int batch) {
    if (p.N == 0) {
      s = sequence_of(p, batch);
      first = tile * kRows;
      return;
    }
    int low = 0, high = static_cast<int>(p.N) + 1;  // the rest stands for sequence N
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first_tile(p, middle) <= tile ? low : high) = middle;
    }
    s = low < p.N ? sequence_of(p, low) : rest_of(p);
    first = (tile - first_tile(p, low)) * kRows;
  }
};

// A tile of queries from q0 on.
template <int kRows>
struct QueryTile : BlockTile<kRows, false> {
  int q0;

  ATTN_DEV QueryTile(const Call& c, int x) : BlockTile<kRows, false>(c, x), q0(this->first) {}
};

}  // namespace attn::cuda
