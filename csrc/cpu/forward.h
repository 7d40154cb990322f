// Forward: out, m, l and, where asked for, the weights in the same pass.
//
// A tile is up to 64 queries of one head (of all heads in order, where their weights are averaged), computed
// whole by one thread over the keys in order: the same bits whatever the number of threads. A unit of work is
// a few tiles, which go over the keys together: what has to be copied or converted of them is so once.
#pragma once
#include "band.h"
#include "softmax.h"
#include "sums.h"
#include "tiles.h"

namespace attn::cpu::ATTN_ISA {
namespace {

constexpr int64_t kForwardTiles = 8;           // of a unit, at most
constexpr int64_t kForwardBytes = 544 * 1024;  // of their queries and sums: they stay in the second cache
constexpr int64_t kUnitsPerThread = 8;         // enough for threads to end together

// One tile of queries of a unit.
struct ForwardTile {
  Cell* packed;
  Real* out;
  Rows64* rows;
  int64_t q0, size, live;  // `size` rows, of which those from `live` on are dead
  Range keys;
  bool first;  // nothing visible was met yet
};

struct ForwardSpace {
  ForwardTile tiles[kForwardTiles];
  Cell *k, *v, *p;  // p: probabilities as cells
  Real* s;
  uint64_t *seen, *kept;
  WeightSpace weights;

  ForwardSpace(Carver& c, const Problem* p, int64_t together, bool keeps_weights, bool average) {
    const int64_t wide_v = round_up(p->Dv, kWidth);
    for (int64_t i = 0; i < together; ++i) {
      tiles[i].rows = c.take<Rows64>(1);
      tiles[i].packed = c.take<Cell>(packed_size(p->D));
      tiles[i].out = c.take<Real>(wide_v * kQueries);
    }
    const bool narrow = p->dtype == Dtype::bf16 || p->dtype == Dtype::f16;
    k = c.take<Cell>(narrow ? round_up(cells(p->D), kWidth) * kMaxKeys : 0);
    v = c.take<Cell>(depth_of(kMaxKeys) * wide_v);
    this->p = c.take<Cell>(kPerCell > 1 ? depth_of(kMaxKeys) * kQueries : 0);
    seen = c.take<uint64_t>(kMaxKeys);
    kept = c.take<uint64_t>(kMaxKeys);
    weights = WeightSpace(c, p->S, keeps_weights, average);
    s = keeps_weights ? weights.scores : c.take<Real>(kMaxKeys * kQueries);
  }
};

// Tiles per unit. No bit depends on it.
ATTN_INLINE int64_t forward_together(const Problem& p, const Weights* weights) {
  if (weights) return 1;
  const int64_t each = (cells(p.D) + p.Dv) * kQueries * static_cast<int64_t>(sizeof(Real)) +
                       static_cast<int64_t>(sizeof(Rows64));
  const int64_t units = kUnitsPerThread * thread_count();
  return clamp(least(kForwardBytes / each, query_tiles(p) * p.Hq / units), 1, kForwardTiles);
}

template <class T>
struct Forward {
  const Problem& p;
  const Weights* weights;
  const int64_t together;

  // `n` tiles of one head: leaves out (not yet divided), m and l in them.
  void attend(const Sequence& s, int64_t head, const Dropout& dropout, int64_t n, ForwardSpace& w) const {
    const Mask mask(p, s, head);
    const Extras extras(p, s, head);
    const T* k = rows_at<T>(p.k, s.batch, head / (p.Hq / p.Hkv), s.k_first);
    const T* v = rows_at<T>(p.v, s.batch, head / (p.Hq / p.Hkv), s.k_first);
    Range all{s.keys, 0};
    for (int64_t i = 0; i < n; ++i) {
      ForwardTile& t = w.tiles[i];
      t.rows->reset();
      t.first = true;
      t.keys = t.live > 0 ? mask.keys(t.q0, t.live) : Range{0, 0};
      if (t.keys.begin < t.keys.end) all = {least(all.begin, t.keys.begin), most(all.end, t.keys.end)};
    }
    w.weights.tiles = 0;
    const int64_t step = mask.tile_keys();
    // The first keys come from far. Further on a CPU foresees them by itself, and what is fetched by hand
    // would only stand in its way; but where weights take the second cache, all keys come from far.
    const int64_t unforeseen = weights ? all.end : all.begin / step * step + 2 * step;
    for (int64_t k0 = all.begin / step * step; k0 < all.end; k0 += step) {
      const int64_t count = least(step, all.end - k0);
      Operand left{}, right{};  // of these keys, made by the first tile that needs them
      int64_t made = 0;         // keys of `right`
      for (int64_t i = 0; i < n; ++i) {
        ForwardTile& t = w.tiles[i];
        const int64_t nk = least(step, t.keys.end - k0), nq = t.live;
        if (nk <= 0) continue;
        const Visible visible = classify(mask, t.q0, nq, k0, nk, w.seen);
        if (visible == kEmpty) continue;
        const uint64_t* seen = visible == kPartial ? w.seen : nullptr;
        if (t.first) read_queries(s, head, t);
        if (!left.data) left = left_operand(k + k0 * p.k.row, p.k.row, count, p.D, w.k);
        Real* scores = weights ? w.s + k0 * kQueries : w.s;
        const Real factor =
            score_tile(extras, left, p.D, t.packed, t.q0, nq, k0, nk, seen, scores, nullptr,
                       right.data || k0 >= unforeseen ? Ahead() : Ahead(v + k0 * p.v.row, p.v.row, p.Dv));
        // What nobody else wants need not be written as numbers.
        const bool as_cells = !kOneForm && !weights && !dropout.on;
        soften(t, nk, seen, factor, scores, as_cells ? w.p : nullptr);
        if (dropout.on) {
          dropout_tile(dropout, t.q0, nq, k0, nk, w.kept);
          seen = both(seen, nk, w.kept);
          drop(seen, dropout.inverse, nq, nk, scores);
        }
        if (weights) w.weights.remember(k0, nk, seen, t.rows->m);
        // To the end of a depth values are multiplied by 0: none that this tile does not see may be there.
        const int64_t values = depth_of(nk) * kPerCell == nk ? count : nk;
        if (values != made) right = key_operand(v + k0 * p.v.row, p.v.row, values, p.Dv, w.v);
        made = values;
        add_to_queries(mask, t.q0, nq, k0, nk, as_cells ? w.p : columns_of(scores, nq, nk, w.p), right, p.Dv,
                       t.out, t.first);
        t.first = false;
      }
    }
  }

  void read_queries(const Sequence& s, int64_t head, ForwardTile& t) const {
    Ahead(rows_at<T>(p.out, s.batch, head, s.q_first + t.q0), p.out.row, p.Dv).fetch(0, t.live);
    pack_columns(rows_at<T>(p.q, s.batch, head, s.q_first + t.q0), p.q.row, t.live, p.D, query_scale(p),
                 t.packed);
  }

  // Scores to exponentials (in `columns`, where given), and what was summed up before to their shift.
  void soften(ForwardTile& t, int64_t nk, const uint64_t* seen, Real factor, Real* scores,
              Cell* columns) const {
    t.rows->reset_maxima(t.live);
    raise_maxima(scores, t.live, nk, t.rows->maxima);
    t.rows->scale_maxima(t.live, factor);
    if (t.rows->move(t.live) && !t.first) scale_sums(t.rows->factor, t.live, p.Dv, t.out);
    if (columns)
      exponentials<!kOneForm>(seen, t.live, nk, factor, t.rows->m, t.rows->l, scores, columns);
    else
      exponentials(seen, t.live, nk, factor, t.rows->m, t.rows->l, scores);
  }

  void run(const Sequence& s, int64_t head, int64_t n, ForwardSpace& w) const {
    attend(s, head, Dropout(p, s, head), n, w);
    for (int64_t i = 0; i < n; ++i) write(s, head, w.tiles[i]);
    const ForwardTile& t = w.tiles[0];
    if (weights) w.weights.template finish<T>(p, *weights, s, head, t.q0, t.live, t.size, *t.rows);
  }

  void write(const Sequence& s, int64_t head, const ForwardTile& t) const {
    T* out = rows_at<T>(p.out, s.batch, head, s.q_first + t.q0);
    const int64_t at = (s.batch * p.Hq + head) * p.L + s.q_first + t.q0;
    Real* m = p.m ? static_cast<Real*>(p.m) + at : nullptr;
    Real* l = p.l ? static_cast<Real*>(p.l) + at : nullptr;
    Real factor[kQueries] = {};
    for (int64_t i = 0; i < t.size; ++i) {
      const Real total = i < t.live ? t.rows->l[i] : 0;
      factor[i] = total == 0 ? 0 : 1 / total;
      if (m) m[i] = total == 0 ? -kInfinity : t.rows->m[i];
      if (l) l[i] = total;
    }
    write_sums(factor, t.size, p.Dv, t.out, out, p.out.row);
  }

  // Tiles of one sequence and head go together.
  static void unit(void* context, int64_t i) {
    const auto& f = *static_cast<const Forward*>(context);
    const int64_t heads = f.heads(), last = least((i + 1) * f.together, query_tiles(f.p) * heads);
    ForwardSpace w =
        carve<ForwardSpace>(&f.p, f.together, f.weights != nullptr, f.weights && f.weights->average);
    take_tiles();
    int64_t n = 0;
    for (int64_t at = i * f.together; at < last; ++at) {
      const QueryTile t(f.p, at, heads);
      if (t.rows > 0) {
        const int64_t live = clamp(Sequence(f.p, t.sequence).queries - t.q0, 0, t.rows);
        ForwardTile& to = w.tiles[n++];
        to.q0 = t.q0;
        to.size = t.rows;
        to.live = live;
      }
      const bool ends = at + 1 == last || !QueryTile(f.p, at + 1, heads).beside(t);
      if (n == 0 || !ends) continue;
      f.all_of(Sequence(f.p, t.sequence), t.head, n, w);
      n = 0;
    }
    return_tiles();
  }

  // Heads that are told apart by units.
  int64_t heads() const { return weights && weights->average ? 1 : p.Hq; }

  void all_of(const Sequence& s, int64_t head, int64_t n, ForwardSpace& w) const {
    if (!(weights && weights->average)) return run(s, head, n, w);
    const ForwardTile& t = w.tiles[0];
    w.weights.clear(p.S);
    for (int64_t h = 0; h < p.Hq; ++h) run(s, h, n, w);
    w.weights.template write_mean<T>(p, *weights, s, t.q0, t.size);
  }
};

template <class T>
void forward_of(const Problem& p, const Weights* weights) {
  Forward<T> f{p, weights, forward_together(p, weights)};
  zero_rest<T>(p);
  const int64_t tiles = query_tiles(p) * f.heads();
  run_units((tiles + f.together - 1) / f.together, multiplications(p), Forward<T>::unit, &f);
}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
