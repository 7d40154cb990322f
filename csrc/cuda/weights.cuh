// Attention weights from m and l: probabilities after dropout, per head or averaged over the heads in their
// order, written once. A block makes one tile of queries by keys.
#pragma once
#include "softmax.cuh"

namespace attn::cuda {

template <class T, int kDim>
struct WeightsKernel {
  struct Params {
    Call c;
    Weights weights;
    int access;  // of a row of weights
  };
  static constexpr bool kFloat = std::is_same_v<T, float>;
  static constexpr int kWarps = kFloat && kDim > 128 ? 2 : 4;
  static constexpr int kKeys = kFloat ? (kDim > 64 ? 16 : 32) : kDim > 64 ? 32 : 64, kN = kKeys / 8;
  static constexpr int kRows = kWarps * 16, kThreads = kWarps * 32, kMinBlocks = 2;
  using QTile = Tile<T, kRows, kDim>;
  using KeyTile = Tile<T, kKeys, kDim>;
  using OutTile = Tile<T, kRows, kKeys>;
  using Piece = Staged<16, kKeys>;
  static constexpr int kStage = QTile::kBytes + KeyTile::kBytes, kPieces = kWarps * Piece::kBytes;
  static constexpr int kStages = 2 * kStage + kPieces <= 99 * 1024 ? 2 : 1;  // heads under way
  static constexpr int kSmem = kStages * kStage + kPieces;
  static_assert(OutTile::kBytes <= kStage && kSmem <= 99 * 1024);

  ATTN_DEV static int tiles(int64_t n, int size) { return static_cast<int>((n + size - 1) / size); }
  static int64_t blocks(const Params& x) {
    const Problem& p = x.c.p;
    return (p.S + kKeys - 1) / kKeys * ((p.L + kRows - 1) / kRows) * p.B * (x.weights.average ? 1 : p.Hq);
  }

  const Params& x;
  Sequence s;
  int head, heads, q0, k0;  // those of this block, from `head` on
  Mask mask;

  ATTN_DEV static void run(const Params& x) {
    const Problem& p = x.c.p;
    const int key_tiles = tiles(p.S, kKeys), query_tiles = tiles(p.L, kRows);
    int rest = static_cast<int>(bid_x());
    const int k0 = rest % key_tiles * kKeys;
    rest /= key_tiles;
    const int q0 = rest % query_tiles * kRows;
    rest /= query_tiles;
    const int heads = static_cast<int>(p.Hq), pair = x.weights.average ? rest * heads : rest;
    const Sequence s = sequence_of(p, pair / heads);
    WeightsKernel{x, s, pair % heads, x.weights.average ? heads : 1, q0, k0, Mask(x.c, s)}.make();
  }

 private:
  ATTN_DEV static uint32_t stage(int i) { return smem_base() + static_cast<uint32_t>(i % kStages * kStage); }

  ATTN_DEV void copy(int i) const {
    const Call& c = x.c;
    const int h = head + i, kv_head = h / c.group;
    const int width = static_cast<int>(c.p.D) * static_cast<int>(sizeof(T));
    copy_tile<QTile, kThreads>(stage(i), global_rows<T>(c.p.q, s.batch, h, 0), q0, s.queries, width,
                               c.q_access);
    copy_tile<KeyTile, kThreads>(stage(i) + QTile::kBytes, global_rows<T>(c.p.k, s.batch, kv_head, 0), k0,
                                 s.keys, width, c.k_access);
  }

  ATTN_DEV void make() const {
    const int row = static_cast<int>(tid() / 32) * 16;
    float total[1][kN][4];
    clear(total);
    const Visible visible = mask.tile(q0, kRows, k0, kKeys);
    if (visible != Visible::kEmpty) {
      copy(0);
      cp_async_commit();
      for (int i = 0; i < heads; ++i) {
        if (kStages == 2 && i + 1 < heads) copy(i + 1);
        cp_async_commit();
        cp_async_wait<1>();
        sync_threads();
        add(i, row, visible != Visible::kFull || mask.ids_k, total);
        sync_threads();
        if (kStages == 1 && i + 1 < heads) copy(i + 1);
        if (kStages == 1) cp_async_commit();
      }
    }
    cp_async_wait<0>();
    write(row, total);
  }

  // The weights of one head.
  ATTN_DEV void add(int i, int row, bool partial, float (&total)[1][kN][4]) const {
    const Problem& p = x.c.p;
    const int h = head + i;
    float w[1][kN][4];
    clear(w);
    multiply_rows<QTile, KeyTile>(w, stage(i), row, stage(i) + QTile::kBytes, 0);
    const uint32_t piece = smem_base() + kStages * kStage + static_cast<uint32_t>(tid() / 32) * Piece::kBytes;
    finish_scores<kEverything>(Extras(x.c, s, h), DensePart(p, s, h), mask, partial, q0 + row, k0, piece, w);
    ATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int r = q0 + row + row_of(0, 2 * half);
      const int64_t at = (s.batch * p.Hq + h) * p.L + r;
      const bool live = r < s.queries;
      const Residual residual(live ? ldg(static_cast<const float*>(p.m) + at) : 0.f,
                              live ? ldg(static_cast<const float*>(p.l) + at) : 0.f);
      ATTN_UNROLL
      for (int n = 0; n < kN; ++n) ATTN_UNROLL
      for (int e = 2 * half; e < 2 * half + 2; ++e) w[0][n][e] = residual.probability(w[0][n][e]);
    }
    const Dropout dropout(x.c, s, h);
    if (dropout.on) drop(dropout, q0 + row, k0, w);
    ATTN_UNROLL
    for (int n = 0; n < kN; ++n) ATTN_UNROLL
    for (int e = 0; e < 4; ++e) total[0][n][e] += w[0][n][e];
  }

  ATTN_DEV void write(int row, const float (&total)[1][kN][4]) const {
    const Problem& p = x.c.p;
    const float share = x.c.inverse_keep / static_cast<float>(heads);
    const float factor[1][2] = {{share, share}};
    put_rows<OutTile>(smem_base(), row, total, factor);
    sync_warp();
    const int size = sizeof(T);
    const int64_t first = (x.weights.average ? s.batch : s.batch * p.Hq + head) * p.L;
    const GlobalRows to{static_cast<const char*>(x.weights.data) + (first * p.S + k0) * size, p.S * size};
    const int width = least(static_cast<int>(p.S) - k0, kKeys) * size;
    store_rows<OutTile>(smem_base(), row, 16, to, q0, static_cast<int>(p.L), width, x.access);
  }
};

}  // namespace attn::cuda
