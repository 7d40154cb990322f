// Forward: out, m and l of one tile of queries per block.
#pragma once
#include "attend.cuh"
#include "schedule.cuh"

namespace attn::cuda {

// Tiles by what fits the registers without spills: two blocks of rows per warp halve what is read of shared
// memory.
template <class T, int kDim, bool kHeavy>
struct ForwardShapes {
  static constexpr bool kFloat = std::is_same_v<T, float>;
  static constexpr int kWarps = kFloat && kDim > 128 ? 2 : 4;
  static constexpr int kM = kFloat || kHeavy || kDim > 128 ? 1 : 2;
  static constexpr int kKeys = kFloat                       ? (kDim > 128  ? 16
                                                               : kDim > 64 ? 32
                                                                           : 64)
                               : kDim > (kHeavy ? 64 : 128) ? 32
                                                            : 64;
  using Shape = AttendShape<T, kDim, kWarps, 1, kM, kKeys, kHeavy ? kEverything : kBandOnly>;
};

template <class T, int kDim, bool kHeavy>
struct Forward {
  using Shape = typename ForwardShapes<T, kDim, kHeavy>::Shape;
  using Params = Call;
  static constexpr int kThreads = Shape::kThreads, kSmem = Shape::kSmem, kMinBlocks = 2, kRows = Shape::kRows;

  ATTN_DEV static void run(const Call& c) {
    const Problem& p = c.p;
    const QueryTile<kRows> t(c, static_cast<int>(bid_x()));
    if (!t.exists) return;
    const Sequence& s = t.s;
    const int size = sizeof(T), kv_head = t.head / static_cast<int>(p.Hq / (p.Hkv > 0 ? p.Hkv : 1));
    const KeyStream<GlobalRows> k{global_rows<T>(p.k, s.batch, kv_head, s.k_first),
                                  static_cast<int>(p.D) * size, c.k_access};
    const KeyStream<GlobalRows> v{global_rows<T>(p.v, s.batch, kv_head, s.k_first),
                                  static_cast<int>(p.Dv) * size, c.v_access};
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
          k, v, s.keys, tiles, Exponent<true>{kLog2eFloat},
          [&](int k0, bool partial, auto& x) {
            finish_scores<kEverything>(extras, dense, mask, partial, q0, k0, a.piece(), x);
          },
          [&](int k0, auto& x) {
            if (dropout.on) drop(dropout, q0, k0, x);
          });
    } else {
      a.run(
          k, v, s.keys, tiles, Exponent<Shape::kExact>{c.unit},
          [&](int k0, bool partial, auto& x) {
            if (partial) hide_band(mask, q0, k0, x);
          },
          [](int, auto&) {});
    }
    write(c, t, a);
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
