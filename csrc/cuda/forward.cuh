// Forward: out, m and l of one tile of queries per block.
#pragma once
#include "attend.cuh"
#include "schedule.cuh"

namespace attn::cuda {

// Keys of a tile: as many as leave no register spilled, and room in shared memory for a second block.
constexpr int forward_keys(bool is_float, bool heavy, int dim) {
  if (is_float) return dim > (heavy ? 64 : 128) ? 16 : dim > 64 ? 32 : 64;
  if (dim > (heavy ? 64 : 128)) return 32;
  return heavy ? 64 : 48;
}

// Two blocks of rows per warp, where the registers hold them, halve what is read of shared memory.
template <class T, int kDim, bool kHeavy>
struct ForwardShapes {
  static constexpr bool kFloat = std::is_same_v<T, float>, kDouble = !kFloat && !kHeavy && kDim <= 128;
  static constexpr int kWarps = kFloat && kDim > 128 ? 2 : 4, kKeys = forward_keys(kFloat, kHeavy, kDim);
  static constexpr int kMinBlocks = kDouble && kDim <= 64 ? 3 : 2;
  using Shape = AttendShape<T, kDim, kWarps, 1, kDouble ? 2 : 1, kKeys, kHeavy ? kEverything : kBandOnly>;
};

template <class T, int kDim, bool kHeavy>
struct Forward {
  using Shapes = ForwardShapes<T, kDim, kHeavy>;
  using Shape = typename Shapes::Shape;
  using Params = Call;
  static constexpr int kThreads = Shape::kThreads, kSmem = Shape::kSmem, kMinBlocks = Shapes::kMinBlocks,
                       kRows = Shape::kRows;

  ATTN_DEV static void run(const Call& c) {
    const Problem& p = c.p;
    const QueryTile<kRows> t(c, static_cast<int>(bid_x()));
    if (!t.exists) return;
    const Sequence& s = t.s;
    const int size = sizeof(T), kv_head = t.head / c.group;
    const auto copy = [&](uint32_t to, const Rows& rows, int k0, int64_t dim, int access) {
      // Where the rows of a head begin is not kept in registers, of which there are none to spare.
      const GlobalRows from = global_rows<T>(rows, s.batch, static_cast<int>(anew(kv_head)), s.k_first);
      copy_tile<typename Shape::KeyTile, kThreads>(to, from, k0, s.keys, static_cast<int>(dim) * size,
                                                   access);
    };
    const auto keys = [&](uint32_t to, int k0) { copy(to, p.k, k0, p.D, c.k_access); };
    const auto values = [&](uint32_t to, int k0) { copy(to, p.v, k0, p.Dv, c.v_access); };
    const Mask mask(c, s, kHeavy);
    const KeyTiles<Shape::kTileKeys, kHeavy> tiles(mask, t.q0, kRows, 0, s.keys);
    Attend<Shape> a;
    copy_tile<typename Shape::QTile, kThreads>(a.smem, global_rows<T>(p.q, s.batch, t.head, s.q_first), t.q0,
                                               s.queries, static_cast<int>(p.D) * size, c.q_access);
    const int q0 = t.q0 + a.row;
    if constexpr (kHeavy) {
      const Extras extras(c, s, t.head);
      const DensePart dense(p, s, t.head);
      const Dropout dropout(c, s, t.head);
      a.run(
          tiles, keys, values, Exponent<true>{kLog2eFloat},
          [&](int k0, bool partial, auto& x) {
            finish_scores<kEverything>(extras, dense, mask, partial, q0, k0, a.piece(), x);
          },
          [&](int k0, auto& x) {
            if (dropout.on) drop(dropout, q0, k0, x);
          });
    } else {
      a.run(
          tiles, keys, values, Exponent<Shape::kExact>{c.unit},
          [&](int k0, bool partial, auto& x) {
            if (partial) hide_band(mask, q0, k0, x);
          },
          [](int, auto&) {});
    }
    write(c, QueryTile<kRows>(c, static_cast<int>(anew(bid_x()))), a);
  }

 private:
  ATTN_DEV static void write(const Call& c, const QueryTile<kRows>& t, Attend<Shape>& a) {
    const Problem& p = c.p;
    const int64_t first = (t.s.batch * p.Hq + t.head) * p.L + t.s.q_first + t.q0;
    float factor[Shape::kBlocksOfRows][2];
    ATTN_UNROLL
    for (int m = 0; m < Shape::kBlocksOfRows; ++m) ATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float l = sum_of_row(a.sums.l[m][half]);
      const int row = a.row + row_of(m, 2 * half);
      const bool dead = l == 0.f || t.q0 + row >= t.s.queries;
      factor[m][half] = dead ? 0.f : rcp(l) * c.inverse_keep;
      if ((lane() & 3) != 0 || t.q0 + row >= t.s.rows) continue;
      const float shift = a.sums.m[m][half];
      if (p.m)
        stg(static_cast<float*>(p.m) + first + row, dead ? -INFINITY : kHeavy ? shift : shift * c.scale);
      if (p.l) stg(static_cast<float*>(p.l) + first + row, dead ? 0.f : l);
    }
    sync_threads();  // Q was copied by all warps; from here on each has rows of its own
    using QTile = typename Shape::QTile;
    put_rows<QTile>(a.smem, a.row, a.out, factor);
    sync_warp();
    store_rows<QTile>(a.smem, a.row, Shape::kBlocksOfRows * 16,
                      global_rows<T>(p.out, t.s.batch, t.head, t.s.q_first), t.q0, t.s.rows,
                      static_cast<int>(p.Dv) * static_cast<int>(sizeof(T)), c.out_access);
  }
};

}  // namespace attn::cuda
