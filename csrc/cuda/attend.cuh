// The loop of attention over tiles of keys, for forward and decoding: scores, online softmax, sum of values.
//
// Tiles of K and V pass in turn, K0 V0 K1 V1 ..., through a ring of three places in shared memory: while one
// is worked on, the two after it are on their way. A warp has kM * 16 rows; kKeyWarps warps share their rows
// and divide each tile's keys among them.
#pragma once
#include "softmax.cuh"

namespace attn::cuda {

template <class T, int kDim, int kRowWarps, int kKeyWarps, int kM, int kKeys, unsigned kFeatureSet>
struct AttendShape {
  using Element = T;
  static constexpr int kRows = kRowWarps * kM * 16, kThreads = kRowWarps * kKeyWarps * 32;
  static constexpr int kWarpKeys = kKeys / kKeyWarps, kBlocksOfRows = kM, kBlocksOfKeys = kWarpKeys / 8;
  static constexpr int kTileKeys = kKeys, kDimension = kDim, kSharers = kKeyWarps;
  static constexpr unsigned kFeatures = kFeatureSet;
  static constexpr bool kExact = std::is_same_v<T, float> || kFeatures != kBandOnly;
  using QTile = Tile<T, kRows, kDim>;
  using KeyTile = Tile<T, kKeys, kDim>;
  using Piece = Staged<kM * 16, kWarpKeys>;
  static constexpr int kPieces = (kFeatures & kDenseParts) != 0 ? Piece::kBytes * kRowWarps * kKeyWarps : 0;
  static constexpr int kRing = QTile::kBytes, kDense = kRing + 3 * KeyTile::kBytes, kSmem = kDense + kPieces;
  static_assert(kSmem <= 99 * 1024, "what every GPU since sm_80 has");
};

template <class Shape>
struct Attend {
  using T = typename Shape::Element;
  using QTile = typename Shape::QTile;
  using KeyTile = typename Shape::KeyTile;
  static constexpr int kM = Shape::kBlocksOfRows, kN = Shape::kBlocksOfKeys, kD = Shape::kDimension / 8;

  float out[kM][kD][4];
  RowSums<kM> sums;
  uint32_t smem;
  int row, key;  // this warp's first ones within a tile

  ATTN_DEV Attend() : smem(smem_base()) {
    const int warp = static_cast<int>(tid() / 32);
    row = warp / Shape::kSharers * kM * 16;
    key = warp % Shape::kSharers * Shape::kWarpKeys;
    clear(out);
    sums.reset();
  }

  // This warp's room for a piece of bias and mask.
  ATTN_DEV uint32_t piece() const {
    return smem + Shape::kDense + static_cast<uint32_t>(tid() / 32) * Shape::Piece::kBytes;
  }

  // Q is under way when this is called, its group not closed, and all copies have arrived when it returns.
  // keys(to, k0), values(to, k0): start the copy of a tile; finish(k0, partial, s): products to scores;
  // dropped(k0, s): dropout.
  template <class Tiles, class Keys, class Values, class Finish, class Drop>
  ATTN_DEV void run(const Tiles& tiles, const Keys& keys, const Values& values,
                    const Exponent<Shape::kExact>& exponent, const Finish& finish, const Drop& dropped) {
    auto tile = tiles.first();
    if (tiles.has(tile)) keys(place(0), tile.k0);
    cp_async_commit();
    if (tiles.has(tile)) values(place(1), tile.k0);
    cp_async_commit();
    int at = 0;
    while (tiles.has(tile)) {
      const auto next = tiles.after(tile);
      cp_async_wait<1>();  // K
      sync_threads();
      const int free = at == 0 ? 2 : at - 1;
      if (tiles.has(next)) keys(place(free), next.k0);
      cp_async_commit();
      float s[kM][kN][4];
      clear(s);
      multiply_rows<QTile, KeyTile>(s, smem, row, place(at), key);
      finish(tile.k0 + key, tile.partial, s);
      sums.take(exponent, s, out);
      dropped(tile.k0 + key, s);
      cp_async_wait<1>();  // V
      sync_threads();
      if (tiles.has(next)) values(place(at), next.k0);
      cp_async_commit();
      multiply_columns<KeyTile>(out, s, place(at == 2 ? 0 : at + 1), key);
      at = free;
      tile = next;
    }
    cp_async_wait<0>();
  }

 private:
  ATTN_DEV uint32_t place(int i) const {
    return smem + Shape::kRing + static_cast<uint32_t>(i * KeyTile::kBytes);
  }
};

}  // namespace attn::cuda
