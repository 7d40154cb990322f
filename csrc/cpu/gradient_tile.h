// The gradient of a tile of scores: P and dS = P (dP - delta) of up to 64 queries by up to 96 keys of one
// head, from the residuals m and l of a forward.
//
// For query i and key j, with dW = d_out v + d_weights: dP = drop(dW), delta = rowsum(out d_out) + rowsum(W
// d_weights) - d_lse; where one tile holds all keys, rowsum(P dP) - d_lse, which is the same without the
// rounding of `out`. Rows that are dead take part as rows of zeros, whatever stands in them.
#pragma once
#include "scores.h"
#include "softmax.h"
#include "tiles.h"

namespace attn::cpu::ATTN_ISA {
namespace {

constexpr int64_t kGradientKeys = 96;  // per tile
constexpr int64_t kMostTiles = 4;

// A tile of queries: what is known of it before any key.
struct GradientQueries {
  Cell *packed_q, *packed_g, *q_space, *g_space;
  void *live_q, *live_g;  // rows with zeros where they are dead
  Real *dq, *m, *inverse, *delta;
  Operand q, g;           // right operands
  int64_t q0, nq, first;  // `first`: of them in m, l and d_lse
  uint64_t live;          // those that are not dead
  Range keys;             // outside which none of them sees any
  bool untouched;         // nothing has been added to dq
  bool one_tile;          // delta is found with the scores

  template <class T>
  ATTN_INLINE void take(Carver& c, int64_t D, int64_t Dv, const T*) {
    const int64_t wide_k = round_up(D, kWidth), wide_v = round_up(Dv, kWidth);
    packed_q = c.take<Cell>(packed_size(D));
    packed_g = c.take<Cell>(packed_size(Dv));
    q_space = c.take<Cell>(depth_of(kQueries) * wide_k);
    g_space = c.take<Cell>(depth_of(kQueries) * wide_v);
    live_q = c.take<T>(D * kQueries);
    live_g = c.take<T>(Dv * kQueries);
    dq = c.take<Real>(wide_k * kQueries);
    m = c.take<Real>(kQueries);
    inverse = c.take<Real>(kQueries);
    delta = c.take<Real>(kQueries);
  }
};

struct GradientSpace {
  GradientQueries queries[kMostTiles];
  Cell *k, *v;            // of all keys, where rows cannot be read in place: copied as they are met
  Cell *left_k, *left_v;  // of a tile, where these are no left operands
  uint8_t* copied;        // per tile of keys
  int64_t key_tiles;
  Real *p, *ds, *d_cap, *d_weights;  // [key][query]
  Cell* cells_of_tile;               // p or ds
  uint64_t *seen, *kept;

  template <class T>
  GradientSpace(Carver& c, const Problem& problem, const Backward& b, int64_t tiles, int64_t keys,
                const T* type) {
    const int64_t wide_k = round_up(problem.D, kWidth), wide_v = round_up(problem.Dv, kWidth);
    const int64_t tile = kGradientKeys * kQueries;
    for (int64_t i = 0; i < tiles; ++i) queries[i].take(c, problem.D, problem.Dv, type);
    k = c.take<Cell>(is_near<T>(problem.k.row, problem.D) ? 0 : wide_k * depth_of(keys));
    v = c.take<Cell>(is_near<T>(problem.v.row, problem.Dv) || !kOneForm ? 0 : wide_v * cells(keys));
    left_k = c.take<Cell>(kOneForm ? 0 : kGradientKeys * round_up(cells(problem.D), kWidth));
    left_v = c.take<Cell>(kOneForm ? 0 : kGradientKeys * round_up(cells(problem.Dv), kWidth));
    key_tiles = keys / 64 + 1;
    copied = c.take<uint8_t>(key_tiles);
    p = c.take<Real>(tile);
    ds = c.take<Real>(tile);
    d_cap = c.take<Real>(problem.softcap > 0 ? tile : 0);
    d_weights = c.take<Real>(b.d_weights.data ? tile : 0);
    cells_of_tile = c.take<Cell>(kOneForm ? 0 : cells(tile));
    seen = c.take<uint64_t>(kMaxKeys);
    kept = c.take<uint64_t>(kMaxKeys);
  }

  // To be called before the first tile of another key head.
  ATTN_INLINE void forget_keys() { memset(copied, 0, static_cast<size_t>(key_tiles)); }
};

// p: scores, which `factor` is left to multiply, to probabilities, and ds: dP to dS where it is given. Hidden
// pairs become 0, whatever stands there.
template <int N>
ATTN_INLINE void differentiate_columns(const uint64_t* seen, int64_t c, int64_t nk, const GradientQueries& of,
                                       Real factor, Real* p, Real* ds) {
  const Vec times = set(factor);
  Vec minus_m[N], inverse[N], delta[N];
  ATTN_UNROLL
  for (int i = 0; i < N; ++i) {
    minus_m[i] = sub(zero(), load(of.m + c + i * kWidth));
    inverse[i] = load(of.inverse + c + i * kWidth);
    delta[i] = load(of.delta + c + i * kWidth);
  }
  const uint64_t all = bits_between(0, N * kWidth);
  for (int64_t j = 0; j < nk; ++j) {
    const int64_t at = j * kQueries + c;
    const uint64_t bits = seen ? seen[j] >> c & all : all;
    ATTN_UNROLL
    for (int i = 0; i < N; ++i) {
      Vec x = mul(softened(load(p + at + i * kWidth), times, minus_m[i]), inverse[i]);
      Vec y = ds ? mul(x, sub(load(ds + at + i * kWidth), delta[i])) : zero();
      if (bits != all) {
        const Lanes on = lanes_of(bits >> (i * kWidth) & bits_between(0, kWidth));
        x = select(on, x, zero());
        y = select(on, y, zero());
      }
      store(p + at + i * kWidth, x);
      if (ds) store(ds + at + i * kWidth, y);
    }
  }
}

ATTN_NOINLINE void differentiate(const uint64_t* seen, int64_t nk, const GradientQueries& of, Real factor,
                                 Real* p, Real* ds) {
  int64_t c = 0;
  for (; c + kWidth < of.nq; c += 2 * kWidth) differentiate_columns<2>(seen, c, nk, of, factor, p, ds);
  if (c < of.nq) differentiate_columns<1>(seen, c, nk, of, factor, p, ds);
}

// ds times the derivative of the soft cap, which is anything where the pair is hidden.
ATTN_NOINLINE void times_cap(const uint64_t* seen, int64_t nq, int64_t nk, const Real* d_cap, Real* ds) {
  for (int64_t j = 0; j < nk; ++j)
    for (int64_t c = 0; c < nq; c += kWidth) {
      const int64_t at = j * kQueries + c;
      Vec x = mul(load(ds + at), load(d_cap + at));
      if (seen) x = select(lanes_of(seen[j] >> c & bits_between(0, kWidth)), x, zero());
      store(ds + at, x);
    }
}

// to[query] += the sum over keys of p[key][query] other[key][query], hidden pairs left out.
ATTN_NOINLINE void add_products(const uint64_t* seen, int64_t nq, int64_t nk, const Real* p,
                                const Real* other, Real* to) {
  for (int64_t c = 0; c < nq; c += kWidth) {
    Vec total = zero();
    for (int64_t j = 0; j < nk; ++j) {
      Vec x = mul(load(p + j * kQueries + c), load(other + j * kQueries + c));
      if (seen) x = select(lanes_of(seen[j] >> c & bits_between(0, kWidth)), x, zero());
      total = add(total, x);
    }
    store(to + c, add(total, load(to + c)));
  }
}

// ds: dP to dS, given P. Hidden pairs become 0.
ATTN_NOINLINE void subtract_delta(const uint64_t* seen, int64_t nk, const GradientQueries& of, const Real* p,
                                  Real* ds) {
  for (int64_t c = 0; c < of.nq; c += kWidth) {
    const Vec delta = load(of.delta + c);
    for (int64_t j = 0; j < nk; ++j) {
      const int64_t at = j * kQueries + c;
      Vec x = mul(load(p + at), sub(load(ds + at), delta));
      if (seen) x = select(lanes_of(seen[j] >> c & bits_between(0, kWidth)), x, zero());
      store(ds + at, x);
    }
  }
}

// One head of one sequence, at a tile of queries, at a tile of keys.
template <class T>
struct GradientTile {
  const Problem& p;
  const Backward& b;
  const Sequence& s;
  const int64_t head;
  GradientSpace& w;
  const Mask mask;
  const Extras extras;
  const Dropout dropout;

  GradientQueries* of = nullptr;
  int64_t k0 = 0, nk = 0;
  const uint64_t* seen = nullptr;  // null: all
  Operand k{}, v{};                // left operands
  Operand summed_k{};              // a key_operand
  Real factor = 1;                 // left of the scores: score_tile

  GradientTile(const Problem& problem, const Backward& backward, const Sequence& sequence, int64_t which,
               GradientSpace& space)
      : p(problem),
        b(backward),
        s(sequence),
        head(which),
        w(space),
        mask(problem, sequence, which),
        extras(problem, sequence, which),
        dropout(problem, sequence, which) {}

  int64_t step() const { return least<int64_t>(mask.tile_keys(), kGradientKeys); }

  // Goes to the live queries [q0, q0 + nq), which are read into `queries`; their delta is 0.
  void read_queries(GradientQueries& queries, int64_t q0, int64_t nq) {
    of = &queries;
    of->q0 = q0;
    of->nq = nq;
    of->first = (s.batch * p.Hq + head) * p.L + s.q_first + q0;
    of->live = 0;
    of->untouched = true;
    of->one_tile = false;
    const Range r = mask.keys(q0, nq);
    of->keys = {r.begin / step() * step(), r.end};
    for (int64_t i = 0; i < kQueries; ++i) {
      const Real total = i < nq ? static_cast<const Real*>(p.l)[of->first + i] : 0;
      const bool alive = total != 0;
      of->live |= static_cast<uint64_t>(alive) << i;
      of->m[i] = alive ? static_cast<const Real*>(p.m)[of->first + i] : 0;
      of->inverse[i] = alive ? 1 / total : 0;
      of->delta[i] = 0;
    }
    of->q = read_rows(p.q, p.D, query_scale(p), of->live_q, of->packed_q, of->q_space);
    of->g = read_rows(b.d_out, p.Dv, 1, of->live_g, of->packed_g, of->g_space);
  }

  // delta of these queries, or what of it does not wait for the scores.
  void find_delta() {
    of->one_tile = of->keys.end - of->keys.begin <= step();
    if (of->one_tile) {
      for (int64_t i = 0; i < of->nq && b.d_lse; ++i)
        if (of->live >> i & 1) of->delta[i] = -static_cast<const Real*>(b.d_lse)[of->first + i];
      return;
    }
    const T* out = rows_at<const T>(p.out, s.batch, head, s.q_first + of->q0);
    const T* g = rows_at<const T>(b.d_out, s.batch, head, s.q_first + of->q0);
    for (int64_t i = 0; i < of->nq; ++i) {
      if (!(of->live >> i & 1)) continue;
      Vec total = zero();
      for (int64_t d = 0; d < p.Dv; d += kWidth)
        total = fma(load_some(out + i * p.out.row + d, p.Dv - d),
                    load_some(g + i * b.d_out.row + d, p.Dv - d), total);
      of->delta[i] = sum(total) - (b.d_lse ? static_cast<const Real*>(b.d_lse)[of->first + i] : 0);
    }
    if (!b.d_weights.data) return;
    for (int64_t at = of->keys.begin; at < of->keys.end; at += step()) {
      if (!go_to_keys(at, least(step(), of->keys.end - at))) continue;
      scores(nullptr);
      differentiate(seen, nk, *of, factor, w.p, nullptr);
      if (dropout.on) drop(w.kept, dropout.inverse, of->nq, nk, w.p);
      zero_row(nk * kQueries, w.d_weights);
      add_weights(w.d_weights);
      add_products(seen, of->nq, nk, w.p, w.d_weights, of->delta);
    }
  }

  // Goes to the keys [from, from + n); false where no pair is visible.
  bool go_to_keys(int64_t from, int64_t n) {
    k0 = from;
    nk = n;
    const Visible visible = classify(mask, of->q0, of->nq, k0, nk, w.seen);
    if (visible == kEmpty) return false;
    seen = visible == kPartial ? w.seen : nullptr;
    if (of->live != bits_between(0, of->nq)) {
      for (int64_t j = 0; j < nk; ++j) w.seen[j] = seen ? w.seen[j] & of->live : of->live;
      seen = w.seen;
    }
    read_keys();
    return true;
  }

  // Leaves P in w.p, before dropout, and in w.ds the gradient of the scores as they are before the mask.
  void gradient() {
    scores(p.softcap > 0 ? w.d_cap : nullptr);
    score_products(v, p.Dv, of->packed_g, of->nq, nk, seen, 1, w.ds);
    if (b.d_weights.data) add_weights(w.ds);
    if (dropout.on) drop(w.kept, dropout.inverse, of->nq, nk, w.ds);
    if (!of->one_tile) return differentiate(seen, nk, *of, factor, w.p, w.ds);
    differentiate(seen, nk, *of, factor, w.p, nullptr);
    add_products(seen, of->nq, nk, w.p, w.ds, of->delta);
    subtract_delta(seen, nk, *of, w.p, w.ds);
  }

 private:
  void read_keys() {
    uint8_t& copied = w.copied[k0 / step()];
    summed_k = key_rows(p.k, p.D, w.k, copied);
    if constexpr (kOneForm) {
      k = summed_k;
      v = key_rows(p.v, p.Dv, w.v, copied);
    } else {
      k = left_operand(key_at(p.k), p.k.row, nk, p.D, w.left_k);
      v = left_operand(key_at(p.v), p.v.row, nk, p.Dv, w.left_v);
    }
    copied = true;
  }
  const T* key_at(const Rows& rows) const {
    return rows_at<const T>(rows, s.batch, head / (p.Hq / p.Hkv), s.k_first + k0);
  }
  // The whole tile from k0 on, whatever part of it these queries see.
  Operand key_rows(const Rows& rows, int64_t width, Cell* all, bool copied) const {
    const int64_t wide = round_up(width, kWidth), keys = least(step(), s.keys - k0);
    Cell* space = all + k0 / kPerCell * wide;
    if (copied && !is_near<T>(rows.row, width)) return {space, kTurned ? depth_of(keys) : wide};
    return key_operand(key_at(rows), rows.row, keys, width, space);
  }

  // These queries' rows, packed and as a right operand; zeros where they are dead.
  Operand read_rows(const Rows& rows, int64_t width, Real factor, void* live, Cell* packed,
                    Cell* space) const {
    const T* from = rows_at<const T>(rows, s.batch, head, s.q_first + of->q0);
    int64_t stride = rows.row;
    if (of->live != bits_between(0, of->nq)) {
      T* to = static_cast<T*>(live);
      for (int64_t i = 0; i < of->nq; ++i) {
        if (of->live >> i & 1)
          memcpy(to + i * width, from + i * stride, static_cast<size_t>(width) * sizeof(T));
        else
          zero_row(width, to + i * width);
      }
      from = to;
      stride = width;
    }
    pack_columns(from, stride, of->nq, width, factor, packed);
    return right_operand(from, stride, of->nq, width, space);
  }

  void scores(Real* d_cap) {
    factor = score_tile(extras, k, p.D, of->packed_q, of->q0, of->nq, k0, nk, seen, w.p, d_cap);
    if (dropout.on) dropout_tile(dropout, of->q0, of->nq, k0, nk, w.kept);
  }

  Real share() const { return b.average ? 1 / static_cast<Real>(p.Hq) : 1; }

  // Adds the gradient of this head's weights.
  void add_weights(Real* to) {
    const Dense& d = b.d_weights;
    const T* at =
        static_cast<const T*>(d.data) + s.batch * d.batch + head * d.head + of->q0 * d.row + k0 * d.col;
    add_matrix(at, d.row, d.col, share(), of->nq, nk, to);
  }
};

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
