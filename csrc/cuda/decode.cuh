// Decoding: few queries against a long cache. The queries of all heads that share a key head, and all new
// tokens, stand as rows of one tile; the keys are split among blocks, whose results a second kernel combines.
#pragma once
#include "attend.cuh"
#include "decode_plan.h"

namespace attn::cuda {

// Rows of the cache: of a sequence, or by way of its pages. Page numbers are clamped.
struct CacheRows {
  const char* base;
  const int32_t* pages;         // of this sequence, null in a contiguous cache
  int64_t page_stride, stride;  // bytes
  int slots, last_page;

  ATTN_DEV const char* row(int j) const {
    if (!pages) return base + j * stride;
    const int page = clamp<int>(ldg(pages + j / slots), 0, last_page);
    return base + page * page_stride + j % slots * stride;
  }
  ATTN_DEV IndexCursor<CacheRows> cursor(int first, int step) const { return {*this, first, step}; }
};

// The queries of a key head.
struct PackedQueries {
  const char* base;
  int64_t head, stride;  // bytes
  int tokens;

  ATTN_DEV const char* row(int r) const { return base + r / tokens * head + r % tokens * stride; }
  ATTN_DEV IndexCursor<PackedQueries> cursor(int first, int step) const { return {*this, first, step}; }
};

// kManyRows: more than 16 rows, one block of 16 per warp; else the warps share the rows and divide the keys.
template <class T, int kDim, bool kManyRows>
struct DecodeShapes {
  static constexpr bool kFloat = std::is_same_v<T, float>;
  static constexpr bool kWide = kDim > (kFloat ? 64 : 128), kWidest = kFloat && kDim > 128;
  static constexpr int kWarps = kManyRows ? (kWidest ? 2 : 4) : kWidest ? 1 : kWide ? 2 : 4;
  static constexpr int kKeys = kWidest ? 16 : kWide ? 32 : 64;
  using Shape = AttendShape<T, kDim, kManyRows ? kWarps : 1, kManyRows ? 1 : kWarps, 1, kKeys, kCapAndAlibi>;
};

template <class T, int kDim, bool kManyRows>
struct DecodeKernel {
  using Shape = typename DecodeShapes<T, kDim, kManyRows>::Shape;
  using Params = DecodeCall;
  static constexpr int kRows = Shape::kRows, kThreads = Shape::kThreads, kSmem = Shape::kSmem, kMinBlocks = 1;
  static constexpr int kSharers = Shape::kSharers, kParts = kRows * kSharers;
  // After the loop: the sums of each warp's rows, and their m and l.
  static constexpr int kRowBytes = (kDim + 8) * 4, kStats = kParts * kRowBytes;
  static_assert(kStats + kParts * 8 <= kSmem);

  const DecodeCall& c;
  int b, kv_head, split, first_row, rows;  // `rows` of this key head in all

  ATTN_DEV static void run(const DecodeCall& c) {
    int rest = static_cast<int>(bid_x());
    const int split = rest % c.splits;
    rest /= c.splits;
    const int tile = rest % c.row_tiles;
    rest /= c.row_tiles;
    const int heads = static_cast<int>(c.d.Hkv), rows = static_cast<int>(c.d.Hq / c.d.Hkv * c.d.L);
    DecodeKernel{c, rest / heads, rest % heads, split, tile * kRows, rows}.attend();
  }

 private:
  ATTN_DEV int token(int row) const { return (first_row + row) % static_cast<int>(c.d.L); }
  ATTN_DEV int head(int row) const {
    return kv_head * static_cast<int>(c.d.Hq / c.d.Hkv) + (first_row + row) / static_cast<int>(c.d.L);
  }

  ATTN_DEV CacheRows cache(const Rows& r) const {
    const Decode& d = c.d;
    const int64_t size = sizeof(T);
    const char* base = static_cast<const char*>(r.data) + size * kv_head * r.head;
    const int32_t* pages = d.block_table ? d.block_table + b * d.pages : nullptr;
    if (!pages) base += size * b * r.batch;
    return {
        base, pages, size * r.batch, size * r.row, static_cast<int>(d.slots), static_cast<int>(d.blocks) - 1};
  }

  ATTN_DEV void attend() const {
    const Decode& d = c.d;
    const int tokens = static_cast<int>(d.L), length = clamp<int>(ldg(d.lengths + b), 0, c.capacity);
    const int off = length - tokens;
    const Mask mask(d.left < 0 ? -kFar : off - c.left, d.right < 0 ? kFar : off + c.right, length, tokens);
    constexpr int kKeys = Shape::kTileKeys;
    using Tiles = KeyTiles<kKeys, false>;
    const Tiles all(mask, 0, tokens, 0, length);
    const int each = ((all.end - all.begin + kKeys - 1) / kKeys + c.splits - 1) / c.splits * kKeys;
    const int first = all.begin + split * each, last = least(first + each, all.end);
    const Tiles tiles(mask, 0, tokens, first, last);
    Attend<Shape> a;
    if (tiles.has(tiles.first())) {
      const int64_t size = sizeof(T);
      const int64_t first_head = kv_head * (d.Hq / d.Hkv);
      const PackedQueries q{
          static_cast<const char*>(d.q.data) + size * (b * d.q.batch + first_head * d.q.head),
          size * d.q.head, size * d.q.row, tokens};
      copy_tile<typename Shape::QTile, kThreads>(a.smem, q, first_row, rows, static_cast<int>(d.D * size),
                                                 c.q_access);
    }
    int at[2];
    float slopes[2];
    ATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = a.row + row_of(0, 2 * half);
      at[half] = token(row);
      const bool sloped = d.alibi_slopes && first_row + row < rows;
      slopes[half] = sloped ? ldg(d.alibi_slopes + b * d.Hq + head(row)) : 0.f;
    }
    const CacheRows k = cache(d.k), v = cache(d.v);
    const auto copy = [&](uint32_t to, const CacheRows& from, int k0, int64_t dim, int access) {
      copy_tile<typename Shape::KeyTile, kThreads>(to, from, k0, last, static_cast<int>(dim * sizeof(T)),
                                                   access);
    };
    a.run(
        tiles, [&](uint32_t to, int k0) { copy(to, k, k0, d.D, c.k_access); },
        [&](uint32_t to, int k0) { copy(to, v, k0, d.Dv, c.v_access); }, Exponent<true>{kLog2eFloat},
        [&](int k0, bool partial, auto& s) { finish(mask, at, slopes, off, k0, partial, s); },
        [](int, auto&) {});
    merge(a);
  }

  template <int kN>
  ATTN_DEV void finish(const Mask& mask, const int (&at)[2], const float (&slopes)[2], int off, int k0,
                       bool partial, float (&s)[1][kN][4]) const {
    Extras extras(c.scale, c.softcap, c.uncap, nullptr, 0, off);
    extras.alibi = c.d.alibi_slopes != nullptr;
    ATTN_UNROLL
    for (int n = 0; n < kN; ++n) ATTN_UNROLL
    for (int e = 0; e < 4; ++e) {
      float d_cap;
      extras.slope = slopes[e >> 1];
      s[0][n][e] = extras.score(s[0][n][e], at[e >> 1], k0 + col_of(n, e), d_cap);
    }
    if (partial) hide_band(mask, [&](int, int half) { return at[half]; }, k0, s);
  }

  // Adds up what the warps that share rows have, and writes each row: the result, or this split's part of it.
  ATTN_DEV void merge(Attend<Shape>& a) const {
    const uint32_t stats = a.smem + kStats;
    const int part = static_cast<int>(tid() / 32) * 16;  // the first of this warp's rows among all parts
    sync_threads();
    ATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float l = sum_of_row(a.sums.l[0][half]);
      const int row = part + row_of(0, 2 * half);
      if ((lane() & 3) == 0)
        sts(stats + static_cast<uint32_t>(row * 8),
            u32x2{bit_cast<uint32_t>(a.sums.m[0][half]), bit_cast<uint32_t>(l)});
      ATTN_UNROLL
      for (int n = 0; n < kDim / 8; ++n)
        sts(a.smem + static_cast<uint32_t>(row * kRowBytes + col_of(n, 0) * 4),
            u32x2{bit_cast<uint32_t>(a.out[0][n][2 * half]), bit_cast<uint32_t>(a.out[0][n][2 * half + 1])});
    }
    sync_threads();
    for (int row = static_cast<int>(tid() / 32); row < kRows && first_row + row < rows; row += kThreads / 32)
      write(row, a.smem, stats);
  }

  // Part x of a row: those of the warps that share its block of 16.
  ATTN_DEV static int part_of(int row, int x) { return (row / 16 * kSharers + x) * 16 + row % 16; }

  // By one warp.
  ATTN_DEV void write(int row, uint32_t sums, uint32_t stats) const {
    float m = -INFINITY, l = 0.f, factor[kSharers];
    ATTN_UNROLL
    for (int x = 0; x < kSharers; ++x)
      m = fmaxf(m, lds<float>(stats + static_cast<uint32_t>(part_of(row, x) * 8)));
    const float shift = m == -INFINITY ? 0.f : m;
    ATTN_UNROLL
    for (int x = 0; x < kSharers; ++x) {
      const u32x2 part = lds<u32x2>(stats + static_cast<uint32_t>(part_of(row, x) * 8));
      factor[x] = ex2((bit_cast<float>(part.x) - shift) * kLog2eFloat);
      l += bit_cast<float>(part.y) * factor[x];
    }
    const DecodeRow to(c, b, head(row), token(row));
    to.finish(split, m, l);
    const float scale = c.splits > 1 ? 1.f : l == 0.f ? 0.f : rcp(l);
    for (int d = static_cast<int>(lane()); d < static_cast<int>(c.d.Dv); d += 32) {
      float total = 0.f;
      ATTN_UNROLL
      for (int x = 0; x < kSharers; ++x)
        total += factor[x] * lds<float>(sums + static_cast<uint32_t>(part_of(row, x) * kRowBytes + d * 4));
      to.put<T>(split, d, l == 0.f ? 0.f : total * scale);
    }
  }
};

// One row from its splits, in their order; a warp per row.
template <class T>
struct DecodeCombine {
  using Params = DecodeCall;
  static constexpr int kThreads = 128, kSmem = 0, kMinBlocks = 1;

  ATTN_DEV static void run(const DecodeCall& c) {
    const int tokens = static_cast<int>(c.d.L), heads = static_cast<int>(c.d.Hq);
    const int64_t index = static_cast<int64_t>(bid_x()) * (kThreads / 32) + tid() / 32;
    if (index >= c.d.B * heads * tokens) return;
    const int i = static_cast<int>(index % tokens), head = static_cast<int>(index / tokens % heads);
    const DecodeRow row(c, static_cast<int>(index / tokens / heads), head, i);
    float m = -INFINITY, l = 0.f;
    for (int s = 0; s < c.splits; ++s) m = fmaxf(m, ldg(row.stats(s)));
    const float shift = m == -INFINITY ? 0.f : m;
    for (int s = 0; s < c.splits; ++s)
      l += ldg(row.stats(s) + 1) * ex2((ldg(row.stats(s)) - shift) * kLog2eFloat);
    if (lane() == 0) row.lse(m, l);
    for (int d = static_cast<int>(lane()); d < static_cast<int>(c.d.Dv); d += 32) {
      float total = 0.f;
      for (int s = 0; s < c.splits; ++s)
        total += ldg(row.sums(s) + d) * ex2((ldg(row.stats(s)) - shift) * kLog2eFloat);
      stg(row.out<T>() + d, from_float<T>(l == 0.f ? 0.f : total * rcp(l)));
    }
  }
};

}  // namespace attn::cuda
