// Backward: dQ by blocks of queries, dK and dV by blocks of keys. Nothing is added across blocks: the same
// bits come out every time.
//
// A block has rows of its own, queries (Q and d_out) or keys (K and V), and meets tiles of the other kind,
// for keys those of all heads of the group. In both, the rows of the products S and dP are its own, so that P
// and dS go into the next product from the registers that they are in.
#pragma once
#include "gradient.cuh"

namespace attn::cuda {

// What a block of keys writes: above head_dim 128 the registers do not hold both.
enum class Part { kQueries, kKeysAndValues, kKeys, kValues };

// Tiles by what fits the registers without spills, and 99 KB of shared memory. A warp has kM times 16 rows of
// its own: two halve what is read of shared memory.
template <class T, int kDim, bool kHeavy, Part kPart>
struct BackwardShape {
  static constexpr bool kFloat = std::is_same_v<T, float>, kOfQueries = kPart == Part::kQueries;
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(T));
  static constexpr int kM = !kFloat && !kHeavy && kDim <= (kOfQueries ? 64 : 32) ? 2 : 1;

  static constexpr int warps() {
    if (kRowBytes >= 1024) return kHeavy ? 1 : 2;
    return !kFloat && !kHeavy && kDim == 128 ? 8 : 4;
  }
  static constexpr int other() {
    if (kFloat) return kDim <= 32 || (kDim <= 64 && kOfQueries) ? 32 : 16;
    return kDim > 128 ? 16 : kDim > 64 || kM == 2 ? 32 : 64;
  }
  static constexpr int kWarps = warps(), kOwn = kWarps * kM * 16, kOther = other();
  static constexpr int kStages = kRowBytes >= 1024 || (kRowBytes == 512 && kHeavy) ? 1 : 2;
};

template <class T, int kDim, bool kHeavy, Part kPart>
struct BackwardPass {
  struct Params {
    Call c;
    Backward b;
    RowStatistics rows;
    int d_out_access, to_access, to_v_access;  // `to`: dq or dk
    int group, width, v_width;  // query heads of a key head; bytes of a row of q and k, and of v

    Params(const Call& c_, const Backward& b_, const RowStatistics& rows_)
        : c(c_),
          b(b_),
          rows(rows_),
          d_out_access(access_of(b.d_out, c.p.dtype)),
          to_access(access_of(kOfKeys ? b.dk : b.dq, c.p.dtype)),
          to_v_access(access_of(b.dv, c.p.dtype)),
          group(static_cast<int>(c.p.Hq / c.p.Hkv)),
          width(static_cast<int>(c.p.D) * static_cast<int>(sizeof(T))),
          v_width(static_cast<int>(c.p.Dv) * static_cast<int>(sizeof(T))) {}
  };
  using Shape = BackwardShape<T, kDim, kHeavy, kPart>;
  static constexpr bool kOfKeys = kPart != Part::kQueries, kHasSecond = kPart == Part::kKeysAndValues;
  static constexpr bool kNeedsGradient = kPart != Part::kValues;
  static constexpr int kM = Shape::kM, kWarps = Shape::kWarps, kOwn = Shape::kOwn;
  static constexpr int kOther = Shape::kOther, kStages = Shape::kStages;
  static constexpr int kN = kOther / 8, kD = kDim / 8;
  using OwnTile = Tile<T, kOwn, kDim>;
  using OtherTile = Tile<T, kOther, kDim>;
  using Piece = Staged<kM * 16, kOther>;
  using Columns = StagedRows<kOther>;
  static constexpr int kOwnTiles = kNeedsGradient ? 2 : 1;
  static constexpr int kColumns =
      kOfKeys ? (Columns::kBytes + 127) / 128 * 128 : 0;  // tiles begin at 128 bytes
  static constexpr int kStage = 2 * OtherTile::kBytes + kColumns;
  static constexpr int kRing = kOwnTiles * OwnTile::kBytes, kPieces = kRing + kStages * kStage;
  static constexpr int kSmem = kPieces + (kHeavy ? kWarps * Piece::kBytes : 0);
  static_assert(kSmem <= 99 * 1024, "what every GPU since sm_80 has");
  static constexpr int kThreads = kWarps * 32, kMinBlocks = 1;

  ATTN_DEV static void run(const Params& x) {
    const BlockTile<kOwn, kOfKeys> t(x.c, static_cast<int>(bid_x()));
    if (t.exists) BackwardPass(x, t).go();
  }

 private:
  using Block = BlockTile<kOwn, kOfKeys>;
  using Others = std::conditional_t<kOfKeys, QueryTiles<kOther, kHeavy>, KeyTiles<kOther, kHeavy>>;
  using OtherPlace = typename Others::Tile;

  const Params& x;
  const Problem& p;
  const Block& t;
  const Sequence& s;
  const Mask mask;
  const uint32_t smem;
  const int row;  // this warp's first one of its own

  ATTN_DEV BackwardPass(const Params& x_, const Block& t_)
      : x(x_),
        p(x_.c.p),
        t(t_),
        s(t_.s),
        mask(x_.c, t_.s),
        smem(smem_base()),
        row(static_cast<int>(tid() / 32) * kM * 16) {}

  // A tile of the other kind, of one head of the group.
  struct Position {
    int of_group;
    OtherPlace tile;
  };
  ATTN_DEV bool has(const Others& others, const Position& at) const {
    return at.of_group < (kOfKeys ? x.group : 1) && others.has(at.tile);
  }
  ATTN_DEV Position after(const Others& others, const Position& at) const {
    const OtherPlace next = others.after(at.tile);
    if (others.has(next) || !kOfKeys) return {at.of_group, next};
    return {at.of_group + 1, others.first()};
  }
  ATTN_DEV int head_of(const Position& at) const { return kOfKeys ? t.head * x.group + at.of_group : t.head; }
  ATTN_DEV static int start_of(const OtherPlace& tile) {
    if constexpr (kOfKeys)
      return tile.q0;
    else
      return tile.k0;
  }

  ATTN_DEV uint32_t stage(int i) const { return smem + static_cast<uint32_t>(kRing + i * kStage); }
  ATTN_DEV uint32_t piece() const {
    return smem + static_cast<uint32_t>(kPieces) + (kHeavy ? tid() / 32 * Piece::kBytes : 0);
  }

  // The pair of tiles that queries, or keys, come as.
  template <class Tile, bool kBoth>
  ATTN_DEV void copy_queries(uint32_t to, int head, int first) const {
    const GlobalRows q = global_rows<T>(p.q, s.batch, head, s.q_first);
    copy_tile<Tile, kThreads>(to, q, first, s.queries, x.width, x.c.q_access);
    if constexpr (kBoth) {
      const GlobalRows g = global_rows<T>(x.b.d_out, s.batch, head, s.q_first);
      copy_tile<Tile, kThreads>(to + Tile::kBytes, g, first, s.queries, x.v_width, x.d_out_access);
    }
  }
  template <class Tile, bool kBoth>
  ATTN_DEV void copy_keys(uint32_t to, int head, int first) const {
    const GlobalRows k = global_rows<T>(p.k, s.batch, head, s.k_first);
    copy_tile<Tile, kThreads>(to, k, first, s.keys, x.width, x.c.k_access);
    if constexpr (kBoth) {
      const GlobalRows v = global_rows<T>(p.v, s.batch, head, s.k_first);
      copy_tile<Tile, kThreads>(to + Tile::kBytes, v, first, s.keys, x.v_width, x.c.v_access);
    }
  }
  ATTN_DEV void copy_own() const {
    if constexpr (kOfKeys)
      copy_keys<OwnTile, kNeedsGradient>(smem, t.head, t.first);
    else
      copy_queries<OwnTile, true>(smem, t.head, t.first);
  }
  ATTN_DEV void copy_other(uint32_t to, const Position& at) const {
    const int head = head_of(at), first = start_of(at.tile);
    if constexpr (kOfKeys) {
      copy_queries<OtherTile, true>(to, head, first);
      Columns::copy(to + 2 * OtherTile::kBytes, x.rows, x.rows.first(p, s, head) + first);
    } else {
      copy_keys<OtherTile, true>(to, head / x.group, first);
    }
  }

  ATTN_DEV void go() {
    const Others others = tiles();
    float acc[kM][kD][4], second[kM][kHasSecond ? kD : 1][4];
    clear(acc);
    clear(second);
    const auto rows = own_rows();
    Position at{0, others.first()};
    copy_own();
    if (has(others, at)) copy_other(stage(0), at);
    cp_async_commit();
    for (int i = 0; has(others, at); i ^= kStages - 1) {
      const Position next = after(others, at);
      cp_async_wait<0>();
      sync_threads();  // this tile is here, and nobody reads the one before it any more
      if constexpr (kStages == 2) {
        if (has(others, next)) copy_other(stage(i ^ 1), next);
        cp_async_commit();
      }
      if constexpr (kOfKeys)
        meet(at, Columns{stage(i) + 2 * OtherTile::kBytes}, stage(i), acc, second);
      else
        meet(at, rows, stage(i), acc, second);
      if constexpr (kStages == 1) {
        sync_threads();
        if (has(others, next)) copy_other(stage(0), next);
        cp_async_commit();
      }
      at = next;
    }
    cp_async_wait<0>();
    sync_threads();
    write(rows, acc, second);
  }

  ATTN_DEV Others tiles() const {
    if constexpr (kOfKeys)
      return Others(mask, t.first, kOwn);
    else
      return Others(mask, t.first, kOwn, 0, s.keys);
  }
  ATTN_DEV auto own_rows() const {
    if constexpr (kOfKeys)
      return Columns{0};
    else
      return OwnRows<kM>(x.rows, x.rows.first(p, s, t.head), t.first + row, s.queries);
  }

  template <class RowsOf, int kSecond>
  ATTN_DEV void meet(const Position& at, const RowsOf& rows, uint32_t other, float (&acc)[kM][kD][4],
                     float (&second)[kM][kSecond][4]) const {
    const Gradient<T, kOfKeys, kHeavy> gradient(x.c, x.b, s, mask, head_of(at));
    const int q0 = kOfKeys ? start_of(at.tile) : t.first + row,
              k0 = kOfKeys ? t.first + row : start_of(at.tile);
    const uint32_t other_second = other + OtherTile::kBytes;
    float product[kM][kN][4];
    clear(product);
    multiply_rows<OwnTile, OtherTile>(product, smem, row, other, 0);
    if constexpr (kNeedsGradient) {
      float dp[kM][kN][4];
      clear(dp);
      multiply_rows<OwnTile, OtherTile>(dp, smem + OwnTile::kBytes, row, other_second, 0);
      gradient.both(at.tile.partial, q0, k0, piece(), rows, product, dp);
      if constexpr (kHasSecond) multiply_columns<OtherTile>(second, product, other_second, 0);
      multiply_columns<OtherTile>(acc, dp, other, 0);
    } else {
      gradient.probabilities(at.tile.partial, q0, k0, piece(), rows, product);
      multiply_columns<OtherTile>(acc, product, other_second, 0);
    }
  }

  template <class RowsOf, int kSecond>
  ATTN_DEV void write(const RowsOf& rows, float (&acc)[kM][kD][4], float (&second)[kM][kSecond][4]) const {
    if constexpr (kPart == Part::kQueries) {
      store(smem, acc, rows, x.c.scale, x.b.dq, s.q_first, x.width, x.to_access);
    } else if constexpr (kPart == Part::kValues) {
      store(smem, acc, rows, x.c.inverse_keep, x.b.dv, s.k_first, x.v_width, x.to_v_access);
    } else {
      store(smem, acc, rows, x.c.scale, x.b.dk, s.k_first, x.width, x.to_access);
      if constexpr (kHasSecond)
        store(smem + OwnTile::kBytes, second, rows, x.c.inverse_keep, x.b.dv, s.k_first, x.v_width,
              x.to_v_access);
    }
  }

  // Through this warp's rows of `place`. Dead rows are 0, whatever they have met.
  template <class RowsOf>
  ATTN_DEV void store(uint32_t place, float (&acc)[kM][kD][4], const RowsOf& rows, float factor,
                      const Rows& to, int first, int width, int access) const {
    float factors[kM][2];
    ATTN_UNROLL
    for (int m = 0; m < kM; ++m) ATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      bool live = t.first + row + row_of(m, 2 * half) < s.keys;
      if constexpr (!kOfKeys) live = rows.template of<kLog>(0.f, m, half) < INFINITY;
      ATTN_UNROLL
      for (int d = 0; d < kD; ++d) ATTN_UNROLL
      for (int e = 2 * half; e < 2 * half + 2; ++e)
        if (!live) acc[m][d][e] = 0.f;
      factors[m][half] = factor;
    }
    put_rows<OwnTile>(place, row, acc, factors);
    sync_warp();
    store_rows<OwnTile>(place, row, kM * 16, global_rows<T>(to, s.batch, t.head, first), t.first,
                        kOfKeys ? s.key_rows : s.rows, width, access);
  }
};

}  // namespace attn::cuda
