// Which keys a query sees: a product of four parts (see attn/masks.py), asked for one score or for a tile.
//
//   lengths    Sequence: what lies behind them is never read, and its rows are dead
//   band       Mask::low, high, prefix
//   documents  Mask::ids_q, ids_k
//   dense      read with the bias: dense.cuh
//
// All positions are those inside the sequence. Values that the host could not check are clamped here.
#pragma once
#include "call.h"
#include "prim.cuh"

namespace attn::cuda {

using namespace prim;

template <class T>
ATTN_DEV T least(T a, T b) {
  return a < b ? a : b;
}
template <class T>
ATTN_DEV T most(T a, T b) {
  return a < b ? b : a;
}
template <class T>
ATTN_DEV T clamp(T x, T low, T high) {
  return least(most(x, low), high);
}

// One row of the batch, or one packed sequence.
struct Sequence {
  int batch;             // index into the batch dim of every tensor
  int number;            // what the dropout and per-sequence tables count
  int q_first, k_first;  // its first rows
  int queries, keys;     // its lengths
  int rows, key_rows;    // of q and k, which include the dead ones
};

ATTN_DEV int cumulative(const int32_t* values, int n, int total) {
  return clamp<int>(ldg(values + n), 0, total);
}

ATTN_DEV Sequence sequence_of(const Problem& p, int n) {
  Sequence s;
  const bool packed = p.N > 0;
  s.batch = packed ? 0 : n;
  s.number = n;
  s.q_first = packed ? cumulative(p.cu_seqlens_q, n, static_cast<int>(p.L)) : 0;
  s.k_first = packed ? cumulative(p.cu_seqlens_k, n, static_cast<int>(p.S)) : 0;
  s.rows = (packed ? most(cumulative(p.cu_seqlens_q, n + 1, static_cast<int>(p.L)), s.q_first)
                   : static_cast<int>(p.L)) -
           s.q_first;
  s.key_rows = (packed ? most(cumulative(p.cu_seqlens_k, n + 1, static_cast<int>(p.S)), s.k_first)
                       : static_cast<int>(p.S)) -
               s.k_first;
  s.queries = p.query_lengths ? clamp<int>(ldg(p.query_lengths + n), 0, s.rows) : s.rows;
  s.keys = p.key_lengths ? clamp<int>(ldg(p.key_lengths + n), 0, s.key_rows) : s.key_rows;
  return s;
}

// The rows of a packed call that belong to no sequence, as a sequence of dead ones.
ATTN_DEV Sequence rest_of(const Problem& p) {
  const int n = static_cast<int>(p.N), L = static_cast<int>(p.L), S = static_cast<int>(p.S);
  const int q_first = cumulative(p.cu_seqlens_q, n, L), k_first = cumulative(p.cu_seqlens_k, n, S);
  return {0, 0, q_first, k_first, 0, 0, L - q_first, S - k_first};
}

ATTN_DEV int64_t of_lane(int64_t x, int mask) {
  const uint64_t bits = static_cast<uint64_t>(x);
  const uint32_t low = shfl_xor(static_cast<uint32_t>(bits), mask);
  const uint32_t high = shfl_xor(static_cast<uint32_t>(bits >> 32), mask);
  return static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | low);
}

enum class Visible { kEmpty, kPartial, kFull };

struct Mask {
  int low, high, prefix;  // i + low <= j <= i + high, or j < prefix
  int keys, queries;
  const int64_t *ids_q, *ids_k;  // null without documents

  // `documents`: false where the call is known to have neither documents nor a prefix.
  ATTN_DEV Mask(const Call& c, const Sequence& s, bool documents = true) : keys(s.keys), queries(s.queries) {
    const int off = c.p.end ? s.keys - s.queries : 0;
    low = c.p.left < 0 ? -kFar : off - c.left;
    high = c.p.right < 0 ? kFar : off + c.right;
    prefix = documents && c.p.prefix && c.banded ? clamp<int>(ldg(c.p.prefix + s.number), 0, s.keys) : 0;
    ids_q = documents && c.p.ids_q ? c.p.ids_q + s.batch * c.p.L + s.q_first : nullptr;
    ids_k = documents && c.p.ids_k ? c.p.ids_k + s.batch * c.p.S + s.k_first : nullptr;
  }
  // The band alone, whose anchor is `off`.
  ATTN_DEV Mask(int low_, int high_, int keys_, int queries_)
      : low(low_), high(high_), prefix(0), keys(keys_), queries(queries_), ids_q(nullptr), ids_k(nullptr) {}

  // The band with queries and keys exchanged.
  ATTN_DEV Mask mirrored() const { return Mask(-high, -low, queries, keys); }

  // By lengths of keys and band.
  ATTN_DEV bool near(int i, int j) const { return j < keys && j >= i + low && j <= i + high; }
  // By the prefix too.
  ATTN_DEV bool near_or_prefix(int i, int j) const {
    return j < keys && ((j >= i + low && j <= i + high) || j < prefix);
  }

  // What lengths and band leave of a tile.
  ATTN_DEV Visible tile(int q0, int nq, int k0, int nk) const {
    if (q0 >= queries || k0 >= keys) return Visible::kEmpty;
    const int q1 = q0 + nq - 1, k1 = k0 + nk - 1;
    if (k1 < keys && (k1 < prefix || (k0 >= q1 + low && k1 <= q0 + high))) return Visible::kFull;
    const bool outside = k0 >= prefix && (k1 < q0 + low || k0 > q1 + high);
    return outside ? Visible::kEmpty : Visible::kPartial;
  }
};

// The least and the greatest id of n positions from `first` on; the same in every lane.
struct Ids {
  int64_t low, high;
};
ATTN_DEV Ids extremes(const int64_t* ids, int first, int n, int end) {
  Ids e{INT64_MAX, INT64_MIN};
  for (int x = static_cast<int>(lane()); x < n; x += 32) {
    if (first + x >= end) break;
    const int64_t id = ldg(ids + first + x);
    e.low = least(e.low, id);
    e.high = most(e.high, id);
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    e.low = least(e.low, of_lane(e.low, mask));
    e.high = most(e.high, of_lane(e.high, mask));
  }
  return e;
}

// What documents leave of the tile between positions whose ids are within `mine` and n others from `first`
// on.
ATTN_DEV Visible documents(const Ids& mine, const int64_t* ids, int first, int n, int end) {
  bool some = false, other = false;
  for (int x = static_cast<int>(lane()); x < n; x += 32) {
    if (first + x >= end) break;
    const int64_t id = ldg(ids + first + x);
    some = some || (id >= mine.low && id <= mine.high);
    other = other || id != mine.low;
  }
  if (!vote_any(some)) return Visible::kEmpty;
  return vote_any(other || mine.low != mine.high) ? Visible::kPartial : Visible::kFull;
}

// The tiles of kKeys keys that the queries [q0, q0 + nq) visit, in ascending order. Every warp of a block
// finds the same ones. kDocuments: whether the mask may have documents or a prefix.
template <int kKeys, bool kDocuments>
struct KeyTiles {
  struct Tile {
    int k0;
    bool partial;  // something in it is hidden
  };

  const Mask& mask;
  int q0, nq, begin, end;
  Ids mine{0, 0};

  // Of the keys [first, last) alone; `first` is a multiple of kKeys.
  ATTN_DEV KeyTiles(const Mask& m, int q0_, int nq_, int first, int last) : mask(m), q0(q0_), nq(nq_) {
    begin = clamp(m.prefix > 0 ? 0 : q0 + m.low, first, most(first, last)) / kKeys * kKeys;
    end = q0 < m.queries ? clamp(most(m.prefix, least(q0 + nq, m.queries) + m.high), begin, most(begin, last))
                         : begin;
    if constexpr (kDocuments)
      if (m.ids_q) mine = extremes(m.ids_q, q0, nq, m.queries);
  }

  ATTN_DEV bool has(const Tile& t) const { return t.k0 < end; }
  ATTN_DEV Tile first() const { return from(begin); }
  ATTN_DEV Tile after(const Tile& t) const { return from(t.k0 + kKeys); }

 private:
  // The first tile from k0 on in which something is visible.
  ATTN_DEV Tile from(int k0) const {
    Visible v = Visible::kPartial;
    while (k0 < end) {
      v = mask.tile(q0, nq, k0, kKeys);
      if constexpr (kDocuments)
        if (mask.ids_k && v != Visible::kEmpty) {
          const Visible same = documents(mine, mask.ids_k, k0, kKeys, mask.keys);
          if (same != Visible::kFull) v = same;
        }
      if (!kDocuments || v != Visible::kEmpty) break;
      k0 += kKeys;
    }
    return {k0, v != Visible::kFull};
  }
};

// Likewise the tiles of kQueries queries that the keys [k0, k0 + nk) are visited by. Keys past the last hide
// nothing.
template <int kQueries, bool kDocuments>
struct QueryTiles {
  struct Tile {
    int q0;
    bool partial;
  };

  const Mask& mask;
  int k0, nk, begin, end;
  Ids mine{0, 0};

  ATTN_DEV QueryTiles(const Mask& m, int k0_, int nk_) : mask(m), k0(k0_), nk(least(nk_, m.keys - k0_)) {
    const bool everyone = k0 < m.prefix;
    begin = clamp(everyone ? 0 : k0 - m.high, 0, m.queries) / kQueries * kQueries;
    end = nk > 0 ? clamp(everyone ? m.queries : k0 + nk - m.low, begin, most(begin, m.queries)) : begin;
    if constexpr (kDocuments)
      if (m.ids_k) mine = extremes(m.ids_k, k0, nk, m.keys);
  }

  ATTN_DEV bool has(const Tile& t) const { return t.q0 < end; }
  ATTN_DEV Tile first() const { return from(begin); }
  ATTN_DEV Tile after(const Tile& t) const { return from(t.q0 + kQueries); }

 private:
  ATTN_DEV Tile from(int q0) const {
    Visible v = Visible::kPartial;
    while (q0 < end) {
      v = mask.tile(q0, kQueries, k0, nk);
      if constexpr (kDocuments)
        if (mask.ids_q && v != Visible::kEmpty) {
          const Visible same = documents(mine, mask.ids_q, q0, kQueries, mask.queries);
          if (same != Visible::kFull) v = same;
        }
      if (!kDocuments || v != Visible::kEmpty) break;
      q0 += kQueries;
    }
    return {q0, v != Visible::kFull};
  }
};

}  // namespace attn::cuda
