// Attention weights: probabilities after dropout, per head or averaged over the heads in their order, written
// once.
//
// In forward a tile of queries keeps its exponentials of all keys, each with the shift that it was made with,
// and the final shift and sum make probabilities of them. From the residuals of a forward the scores are
// computed anew.
#pragma once
#include "softmax.h"
#include "tiles.h"

namespace attn::cpu::ATTN_ISA {
namespace {

// `rows` rows of [key][query] numbers to rows of T: to[query * stride + key], keys [k0, k0 + nk) of which
// stand in `from`.
template <class T>
ATTN_INLINE void write_transposed(const Real* from, Real factor, int64_t rows, int64_t nk, T* to,
                                  int64_t stride) {
  const Vec times = set(factor);
  for (int64_t j = 0; j < nk; j += kWidth)
    for (int64_t c = 0; c < rows; c += kWidth) {
      Vec t[kWidth];
      for (int i = 0; i < kWidth; ++i)
        t[i] = j + i < nk ? mul(load(from + (j + i) * kQueries + c), times) : zero();
      transpose(t);
      const int64_t high = least<int64_t>(kWidth, rows - c);
      for (int64_t i = 0; i < high; ++i) store_some(to + (c + i) * stride + j, t[i], nk - j);
    }
}

// to = p[key][query] * factor[query], or += it, and 0 where hidden or dropped, whatever NaN the row holds.
ATTN_INLINE void scale_columns(const uint64_t* seen, const Real* factor, int64_t nq, int64_t nk,
                               const Real* p, Real* to, bool accumulates) {
  for (int64_t c = 0; c < nq; c += kWidth) {
    const Vec f = load(factor + c);
    for (int64_t j = 0; j < nk; ++j) {
      const int64_t at = j * kQueries + c;
      Vec x = mul(load(p + at), f);
      if (seen) x = select(lanes_of(seen[j] >> c & ((uint64_t{1} << kWidth) - 1)), x, zero());
      store(to + at, accumulates ? add(load(to + at), x) : x);
    }
  }
}

struct WeightSpace {
  Real *scores = nullptr, *mean = nullptr;  // [key][query] of all keys
  Real* shift = nullptr;                    // per tile of keys, kQueries each
  uint64_t* seen = nullptr;                 // per key, where its tile is partial
  struct Tile {
    int64_t k0, nk;
    bool partial;
  };
  Tile* tile = nullptr;
  int64_t tiles = 0;

  WeightSpace() = default;
  ATTN_INLINE WeightSpace(Carver& c, int64_t S, bool on, bool average) {
    if (!on) return;
    const int64_t most_tiles = S / 64 + 1;
    scores = c.take<Real>((S + kMaxKeys) * kQueries);
    shift = c.take<Real>(most_tiles * kQueries);
    seen = c.take<uint64_t>(S + kMaxKeys);
    tile = c.take<Tile>(most_tiles);
    if (average) mean = c.take<Real>((S + kMaxKeys) * kQueries);
  }

  ATTN_INLINE void clear(int64_t S) { memset(mean, 0, static_cast<size_t>(S * kQueries) * sizeof(Real)); }

  // The tile whose exponentials now stand in `scores`, made with shift m.
  ATTN_INLINE void remember(int64_t k0, int64_t nk, const uint64_t* visible, const Real* m) {
    tile[tiles] = {k0, nk, visible != nullptr};
    memcpy(shift + tiles * kQueries, m, kQueries * sizeof(Real));
    if (visible) memcpy(seen + k0, visible, static_cast<size_t>(nk) * sizeof(uint64_t));
    ++tiles;
  }

  // One head is done: into the mean, or out.
  template <class T>
  ATTN_INLINE void finish(const Problem& p, const Weights& w, const Sequence& s, int64_t head, int64_t q0,
                          int64_t live, int64_t rows, const Rows64& r) {
    T* to = static_cast<T*>(w.data) + ((s.batch * p.Hq + head) * p.L + q0) * p.S;
    if (!w.average) zero_block(to, rows, p.S);
    for (int64_t t = 0; live > 0 && t < tiles; ++t) {
      const Tile at = tile[t];
      Real factor[kQueries];
      for (int64_t c = 0; c < live; c += kWidth) {
        const Vec total = load(r.l + c), now = finite_shift(load(r.m + c));
        const Vec then = load(shift + t * kQueries + c);
        const Vec f = div(exp_of(sub(then, now)), total);
        store(factor + c, select(less(zero(), total), f, mul(total, set(1))));
      }
      Real* p_tile = scores + at.k0 * kQueries;
      const uint64_t* visible = at.partial ? seen + at.k0 : nullptr;
      scale_columns(visible, factor, live, at.nk, p_tile, w.average ? mean + at.k0 * kQueries : p_tile,
                    w.average);
      if (!w.average) write_transposed(p_tile, 1, live, at.nk, to + at.k0, p.S);
    }
  }

  template <class T>
  ATTN_INLINE void write_mean(const Problem& p, const Weights& w, const Sequence& s, int64_t q0,
                              int64_t rows) {
    const int64_t live = clamp(s.queries - q0, 0, rows);
    T* to = static_cast<T*>(w.data) + (s.batch * p.L + q0) * p.S;
    write_transposed(mean, 1 / static_cast<Real>(p.Hq), live, p.S, to, p.S);
    zero_block(to + live * p.S, rows - live, p.S);
  }

  template <class T>
  static ATTN_INLINE void zero_block(T* to, int64_t rows, int64_t S) {
    if (S > 0) memset(to, 0, static_cast<size_t>(rows * S) * sizeof(T));  // without keys `to` may be null
  }
};

struct ResidualSpace {
  Cell *packed, *k;
  Real *s, *mean;
  uint64_t *seen, *kept;

  ResidualSpace(Carver& c, const Problem* p) {
    packed = c.take<Cell>(packed_size(p->D));
    s = c.take<Real>(kMaxKeys * kQueries);
    mean = c.take<Real>(kMaxKeys * kQueries);
    const bool narrow = p->dtype == Dtype::bf16 || p->dtype == Dtype::f16;
    k = c.take<Cell>(narrow ? round_up(cells(p->D), kWidth) * kMaxKeys : 0);
    seen = c.take<uint64_t>(kMaxKeys);
    kept = c.take<uint64_t>(kMaxKeys);
  }
};

// Weights from m and l: a unit is a tile of queries by a tile of keys, over the heads in order or for one.
template <class T>
struct FromResiduals {
  const Problem& p;
  const Weights& weights;

  // Adds the weights of one head to w.mean.
  void add_head(const Sequence& s, int64_t head, int64_t q0, int64_t live, int64_t k0, int64_t nk,
                ResidualSpace& w) const {
    const Mask mask(p, s, head);
    const int64_t wanted = least(k0 + nk, s.keys) - k0;
    for (int64_t at = k0; at < k0 + wanted; at += mask.tile_keys()) {
      const int64_t n = least<int64_t>(mask.tile_keys(), k0 + wanted - at);
      const Visible visible = classify(mask, q0, live, at, n, w.seen);
      if (visible == kEmpty) continue;
      add_tile(s, head, q0, live, at, n, visible == kPartial ? w.seen : nullptr, w,
               w.mean + (at - k0) * kQueries);
    }
  }

  void add_tile(const Sequence& s, int64_t head, int64_t q0, int64_t live, int64_t k0, int64_t nk,
                const uint64_t* seen, ResidualSpace& w, Real* to) const {
    const Extras extras(p, s, head);
    const Dropout dropout(p, s, head);
    const T* k = rows_at<T>(p.k, s.batch, head / (p.Hq / p.Hkv), k0);
    pack_columns(rows_at<T>(p.q, s.batch, head, q0), p.q.row, live, p.D, query_scale(p), w.packed);
    const Real scores_factor = score_tile(extras, left_operand(k, p.k.row, nk, p.D, w.k), p.D, w.packed, q0,
                                          live, k0, nk, seen, w.s, nullptr);
    Real m[kQueries] = {}, l[kQueries] = {}, factor[kQueries] = {};
    const int64_t first = (s.batch * p.Hq + head) * p.L + q0;
    for (int64_t i = 0; i < live; ++i) {
      m[i] = static_cast<const Real*>(p.m)[first + i];
      const Real total = static_cast<const Real*>(p.l)[first + i];
      factor[i] = total == 0 ? 0 : 1 / total;
    }
    exponentials(seen, live, nk, scores_factor, m, l, w.s);
    if (dropout.on) {
      dropout_tile(dropout, q0, live, k0, nk, w.kept);
      seen = both(seen, nk, w.kept);
      drop(seen, dropout.inverse, live, nk, w.s);
    }
    scale_columns(seen, factor, live, nk, w.s, to, true);
  }

  static void unit(void* context, int64_t i) {
    const auto& f = *static_cast<const FromResiduals*>(context);
    const Problem& p = f.p;
    const int64_t key_tiles = (p.S + kMaxKeys - 1) / kMaxKeys, k0 = i % key_tiles * kMaxKeys;
    const QueryTile t(p, i / key_tiles, f.weights.average ? 1 : p.Hq);
    const Sequence s(p, t.sequence);
    ResidualSpace w = carve<ResidualSpace>(&p);
    take_tiles();
    const int64_t nk = least<int64_t>(kMaxKeys, p.S - k0), live = clamp(s.queries - t.q0, 0, t.rows);
    memset(w.mean, 0, static_cast<size_t>(nk * kQueries) * sizeof(Real));
    const int64_t last = f.weights.average ? p.Hq : t.head + 1;
    for (int64_t head = t.head; live > 0 && head < last; ++head) f.add_head(s, head, t.q0, live, k0, nk, w);
    const int64_t row = f.weights.average ? s.batch : s.batch * p.Hq + t.head;
    T* to = static_cast<T*>(f.weights.data) + (row * p.L + t.q0) * p.S + k0;
    write_transposed(w.mean, f.weights.average ? 1 / static_cast<Real>(p.Hq) : 1, live, nk, to, p.S);
    for (int64_t r = live; r < t.rows; ++r) zero_row(nk, to + r * p.S);
    return_tiles();
  }
};

template <class T>
void weights_of(const Problem& p, const Weights& weights) {
  FromResiduals<T> f{p, weights};
  const int64_t key_tiles = (p.S + kMaxKeys - 1) / kMaxKeys;
  run_units(query_tiles(p) * key_tiles * (weights.average ? 1 : p.Hq), multiplications(p) / 2,
            FromResiduals<T>::unit, &f);
}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
