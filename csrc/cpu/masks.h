// Which keys a query sees: a product of four parts (see attn/masks.py), asked for a tile of queries by keys.
//
//   lengths    are no mask here: `Sequence` has the lengths inside which there are tokens at all; what lies
//              behind them is never read, and its rows are dead
//   band       Mask::low, high, prefix
//   documents  Mask::ids_q, ids_k
//   dense      Mask::keep
//
// A kernel makes a Sequence, then a Mask for a head of it, walks the tiles of Mask::keys(...), and asks
// `classify` for each. Where the answer is kPartial it has filled `seen`: one word per key, bit i for query
// q0 + i. All positions are those inside the sequence.
#pragma once
#include "rows.h"

namespace attn::cpu::ATTN_ISA {
namespace {

constexpr int64_t kFar = int64_t{1} << 40;  // more than any length
constexpr int kMaxKeys = 96;  // per tile: its scores, and K and V beside them, stay in the nearest caches

// One row of the batch, or one packed sequence.
struct Sequence {
  int64_t batch;             // index into the batch dim of every tensor
  int64_t number;            // what the dropout and per-sequence tables count
  int64_t q_first, k_first;  // its first rows
  int64_t queries, keys;     // its lengths
  int64_t rows;              // of q, which include the dead ones

  ATTN_INLINE Sequence(const Problem& p, int64_t n) {
    const bool packed = p.N > 0;
    batch = packed ? 0 : n;
    number = n;
    q_first = packed ? p.cu_seqlens_q[n] : 0;
    k_first = packed ? p.cu_seqlens_k[n] : 0;
    rows = packed ? p.cu_seqlens_q[n + 1] - q_first : p.L;
    keys = packed ? p.cu_seqlens_k[n + 1] - k_first : p.S;
    queries = p.query_lengths ? least<int64_t>(p.query_lengths[n], rows) : rows;
    if (p.key_lengths) keys = least<int64_t>(p.key_lengths[n], keys);
  }
};
ATTN_INLINE int64_t sequences(const Problem& p) { return p.N > 0 ? p.N : p.B; }

enum Visible { kEmpty, kPartial, kFull };

struct Range {
  int64_t begin, end;
};

struct Mask {
  int64_t low, high, prefix;  // i + low <= j <= i + high, or j < prefix
  int64_t keys_end;
  const int64_t *ids_q = nullptr, *ids_k = nullptr;
  const uint8_t* keep = nullptr;
  int64_t keep_row, keep_col;

  ATTN_INLINE Mask(const Problem& p, const Sequence& s, int64_t head) {
    const int64_t off = p.end ? s.keys - s.queries : 0;
    low = p.left < 0 ? -kFar : off - least(p.left, kFar / 2);
    high = p.right < 0 ? kFar : off + least(p.right, kFar / 2);
    prefix = p.prefix && (p.left >= 0 || p.right >= 0) ? p.prefix[s.number] : 0;
    keys_end = s.keys;
    if (p.ids_q) {
      ids_q = p.ids_q + s.batch * p.L + s.q_first;
      ids_k = p.ids_k + s.batch * p.S + s.k_first;
    }
    if (p.keep.data) {
      keep_row = p.keep.row;
      keep_col = p.keep.col;
      keep = static_cast<const uint8_t*>(p.keep.data) + s.batch * p.keep.batch + head * p.keep.head +
             s.q_first * keep_row + s.k_first * keep_col;
    }
  }

  // Keys per tile: parts that are not known by arithmetic are skipped in finer steps.
  ATTN_INLINE int tile_keys() const { return ids_q || keep ? 64 : kMaxKeys; }

  // The keys outside which no query of [q0, q0 + nq) sees any, by band and lengths.
  ATTN_INLINE Range keys(int64_t q0, int64_t nq) const {
    const int64_t begin = prefix > 0 ? 0 : clamp(q0 + low, 0, keys_end);
    return {begin, clamp(most(prefix, q0 + nq + high), begin, keys_end)};
  }
  // The queries of [0, n) outside which none sees a key of [k0, k0 + nk), by band.
  ATTN_INLINE Range queries(int64_t k0, int64_t nk, int64_t n) const {
    if (k0 < prefix) return {0, n};
    const int64_t begin = clamp(k0 - high, 0, n);
    return {begin, clamp(k0 + nk - low, begin, n)};
  }
};

// Bits [begin, end) of 64.
ATTN_INLINE uint64_t bits_between(int64_t begin, int64_t end) {
  begin = clamp(begin, 0, 64);
  end = clamp(end, 0, 64);
  if (begin >= end) return 0;
  return (end == 64 ? ~uint64_t{0} : (uint64_t{1} << end) - 1) & ~((uint64_t{1} << begin) - 1);
}

// Rows of bits to columns.
ATTN_INLINE void transpose_bits(uint64_t (&a)[64]) {
  uint64_t m = 0xffffffffu;
  for (int j = 32; j; j >>= 1, m ^= m << j)
    for (int k = 0; k < 64; k = ((k | j) + 1) & ~j) {
      const uint64_t t = ((a[k] >> j) ^ a[k | j]) & m;
      a[k] ^= t << j;
      a[k | j] ^= t;
    }
}

ATTN_INLINE Visible classify_band(const Mask& m, int64_t q0, int64_t nq, int64_t k0, int64_t nk) {
  const int64_t q1 = q0 + nq - 1, k1 = k0 + nk - 1;
  if (k1 < m.prefix || (k0 >= q1 + m.low && k1 <= q0 + m.high)) return kFull;
  return k0 >= m.prefix && (k1 < q0 + m.low || k0 > q1 + m.high) ? kEmpty : kPartial;
}

struct Extremes {
  int64_t low, high;
};
ATTN_INLINE Extremes extremes(const int64_t* x, int64_t n) {
  Extremes e{x[0], x[0]};
  for (int64_t i = 1; i < n; ++i) {
    e.low = least(e.low, x[i]);
    e.high = most(e.high, x[i]);
  }
  return e;
}

ATTN_INLINE Visible classify_documents(const Mask& m, int64_t q0, int64_t nq, int64_t k0, int64_t nk) {
  const Extremes q = extremes(m.ids_q + q0, nq), k = extremes(m.ids_k + k0, nk);
  if (q.high < k.low || k.high < q.low) return kEmpty;
  return q.low == q.high && k.low == k.high ? kFull : kPartial;
}

// ANDs the words of up to 64 keys with the dense part.
ATTN_INLINE void and_dense(const Mask& m, int64_t q0, int64_t nq, int64_t k0, int64_t nk, uint64_t* seen) {
  const uint8_t* at = m.keep + q0 * m.keep_row + k0 * m.keep_col;
  uint64_t rows[64];
  const int64_t different = m.keep_row == 0 ? 1 : nq;  // rows of a mask over keys alone are one
  for (int64_t i = 0; i < different; ++i) {
    const uint8_t* row = at + i * m.keep_row;
    if (m.keep_col == 1 && nk == 64) {
      ATTN_PREFETCH(row + 64);  // of the next tile: its rows lie far apart
      rows[i] = true_bytes(row);
    } else {
      uint64_t bits = 0;
      for (int64_t j = 0; j < nk; ++j) bits |= static_cast<uint64_t>(row[j * m.keep_col] != 0) << j;
      rows[i] = bits;
    }
  }
  if (different == 1 && nq > 1) {
    for (int64_t j = 0; j < nk; ++j) seen[j] &= 0 - (rows[0] >> j & 1);
    return;
  }
  for (int64_t i = nq; i < 64; ++i) rows[i] = 0;
  transpose_bits(rows);
  for (int64_t j = 0; j < nk; ++j) seen[j] &= rows[j];
}

// What of the tile is visible. kPartial: seen[j] has bit i set where query q0 + i sees key k0 + j, and no bit
// from nq on. nq <= kQueries, nk <= Mask::tile_keys().
ATTN_INLINE Visible classify(const Mask& m, int64_t q0, int64_t nq, int64_t k0, int64_t nk, uint64_t* seen) {
  const Visible band = classify_band(m, q0, nq, k0, nk);
  if (band == kEmpty) return kEmpty;
  const Visible documents = m.ids_q ? classify_documents(m, q0, nq, k0, nk) : kFull;
  if (documents == kEmpty) return kEmpty;
  if (band == kFull && documents == kFull && !m.keep) return kFull;
  const uint64_t all = bits_between(0, nq);
  for (int64_t j = 0; j < nk; ++j) {
    // Query i of the tile sees key j: j - high <= i <= j - low, counted from q0.
    const int64_t from_q0 = k0 + j - q0;
    const bool whole = band == kFull || k0 + j < m.prefix;
    seen[j] = whole ? all : all & bits_between(from_q0 - m.high, from_q0 - m.low + 1);
  }
  if (documents == kPartial)
    for (int64_t j = 0; j < nk; ++j) {
      const int64_t id = m.ids_k[k0 + j];
      uint64_t same = 0;
      for (int64_t i = 0; i < nq; ++i) same |= static_cast<uint64_t>(m.ids_q[q0 + i] == id) << i;
      seen[j] &= same;
    }
  if (m.keep) and_dense(m, q0, nq, k0, nk, seen);
  uint64_t some = 0, every = all;
  for (int64_t j = 0; j < nk; ++j) {
    some |= seen[j];
    every &= seen[j];
  }
  return some == 0 ? kEmpty : every == all ? kFull : kPartial;
}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
