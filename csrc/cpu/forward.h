// Forward: out, m, l and, where asked for, the weights in the same pass.
//
// A unit of work is one tile of up to 64 queries of one head (of all heads in order, where their weights are
// averaged), computed whole by one thread over the keys in order: the same bits whatever the number of
// threads.
#pragma once
#include "band.h"
#include "softmax.h"
#include "tiles.h"
#include "weights.h"

namespace attn::cpu::ATTN_ISA {
namespace {

struct ForwardSpace {
  Cell *packed, *k, *v, *p;  // p: probabilities as cells
  Real *s, *out, *bias;
  Rows64* rows;
  uint64_t *seen, *kept;
  WeightSpace weights;

  ForwardSpace(Carver& c, const Problem* p, bool keeps_weights, bool average) {
    const int64_t wide_v = round_up(p->Dv, kWidth);
    rows = c.take<Rows64>(1);
    packed = c.take<Cell>(packed_size(p->D));
    out = c.take<Real>(wide_v * kQueries);
    const bool narrow = p->dtype == Dtype::bf16 || p->dtype == Dtype::f16;
    k = c.take<Cell>(narrow ? round_up(cells(p->D), kWidth) * kMaxKeys : 0);
    v = c.take<Cell>(cells(kMaxKeys) * wide_v);
    this->p = c.take<Cell>(kPerCell > 1 ? cells(kMaxKeys) * kQueries : 0);
    bias = c.take<Real>(p->bias.data ? kMaxKeys * kQueries : 0);
    seen = c.take<uint64_t>(kMaxKeys);
    kept = c.take<uint64_t>(kMaxKeys);
    weights = WeightSpace(c, p->S, keeps_weights, average);
    s = keeps_weights ? weights.scores : c.take<Real>(kMaxKeys * kQueries);
  }
};

template <class T>
struct Forward {
  const Problem& p;
  const Weights* weights;

  // The live queries [q0, q0 + nq) of one head: leaves out (not yet divided), m and l in the space.
  void tile(const Sequence& s, int64_t head, int64_t q0, int64_t nq, const Dropout& dropout,
            ForwardSpace& w) const {
    const Mask mask(p, s, head);
    const Extras extras(p, s, head);
    const int64_t stride = round_up(p.Dv, kWidth);
    const T* k = rows_at<T>(p.k, s.batch, head / (p.Hq / p.Hkv), s.k_first);
    const T* v = rows_at<T>(p.v, s.batch, head / (p.Hq / p.Hkv), s.k_first);
    w.rows->reset();
    w.weights.tiles = 0;
    bool first = true;
    const Range range = mask.keys(q0, nq);
    const int64_t step = mask.tile_keys();
    for (int64_t k0 = range.begin / step * step; k0 < range.end; k0 += step) {
      const int64_t nk = least(step, range.end - k0);
      const Visible visible = classify(mask, q0, nq, k0, nk, w.seen);
      if (visible == kEmpty) continue;
      if (first) {
        Ahead(rows_at<T>(p.out, s.batch, head, s.q_first + q0), p.out.row, p.Dv).fetch(0, nq);
        pack_columns(rows_at<T>(p.q, s.batch, head, s.q_first + q0), p.q.row, nq, p.D, query_scale(p),
                     w.packed);
      }
      const uint64_t* seen = visible == kPartial ? w.seen : nullptr;
      Real* scores = weights ? w.s + k0 * kQueries : w.s;
      score_tile(extras, left_operand(k + k0 * p.k.row, p.k.row, nk, p.D, w.k), p.D, w.packed, q0, nq, k0, nk,
                 seen, w.bias, scores, nullptr, Ahead(v + k0 * p.v.row, p.v.row, p.Dv));
      w.rows->reset_maxima(nq);
      raise_maxima(scores, nq, nk, w.rows->maxima);
      if (w.rows->move(nq) && !first) shrink(w, nq, stride);
      exponentials(seen, nq, nk, w.rows->m, w.rows->l, scores);
      if (dropout.on) {
        dropout_tile(dropout, q0, nq, k0, nk, w.kept);
        seen = both(seen, nk, w.kept);
        drop(seen, dropout.inverse, nq, nk, scores);
      }
      if (weights) w.weights.remember(k0, nk, seen, w.rows->m);
      add_to_queries(mask, q0, nq, k0, nk, columns_of(scores, nq, nk, w.p),
                     right_operand(v + k0 * p.v.row, p.v.row, nk, p.Dv, w.v), p.Dv, w.out, first);
      first = false;
    }
  }

  // `rows` rows from q0 on, of which those from s.queries on are dead.
  void run(const Sequence& s, int64_t head, int64_t q0, int64_t rows, ForwardSpace& w) const {
    const int64_t live = clamp(s.queries - q0, 0, rows);
    const Dropout dropout(p, s, head);
    if (live > 0) tile(s, head, q0, live, dropout, w);
    T* out = rows_at<T>(p.out, s.batch, head, s.q_first + q0);
    const int64_t at = (s.batch * p.Hq + head) * p.L + s.q_first + q0;
    Real* m = p.m ? static_cast<Real*>(p.m) + at : nullptr;
    Real* l = p.l ? static_cast<Real*>(p.l) + at : nullptr;
    for (int64_t i = 0; i < rows; ++i) {
      const Real total = i < live ? w.rows->l[i] : 0;
      if (total == 0)
        zero_row(p.Dv, out + i * p.out.row);
      else
        write_row(w.out + i * round_up(p.Dv, kWidth), 1 / total, p.Dv, out + i * p.out.row);
      if (m) m[i] = total == 0 ? -kInfinity : w.rows->m[i];
      if (l) l[i] = total;
    }
    if (weights) w.weights.template finish<T>(p, *weights, s, head, q0, live, rows, *w.rows);
  }

  static void shrink(ForwardSpace& w, int64_t nq, int64_t stride) {
    for (int64_t i = 0; i < nq; ++i) {
      if (w.rows->factor[i] == 1) continue;
      const Vec f = set(w.rows->factor[i]);
      Real* row = w.out + i * stride;
      for (int64_t d = 0; d < stride; d += kWidth) store(row + d, mul(load(row + d), f));
    }
  }

  static void unit(void* context, int64_t i) {
    const auto& f = *static_cast<const Forward*>(context);
    const bool all_heads = f.weights && f.weights->average;
    const QueryTile t(f.p, i, all_heads ? 1 : f.p.Hq);
    if (t.rows == 0) return;
    const Sequence s(f.p, t.sequence);
    ForwardSpace w = carve<ForwardSpace>(&f.p, f.weights != nullptr, all_heads);
    if (all_heads) w.weights.clear(f.p.S);
    const int64_t last = all_heads ? f.p.Hq : t.head + 1;
    for (int64_t head = t.head; head < last; ++head) f.run(s, head, t.q0, t.rows, w);
    if (all_heads) w.weights.template write_mean<T>(f.p, *f.weights, s, t.q0, t.rows);
  }
};

template <class T>
void forward_of(const Problem& p, const Weights* weights) {
  Forward<T> f{p, weights};
  const int64_t heads = weights && weights->average ? 1 : p.Hq;
  zero_rest<T>(p);
  run_units(query_tiles(p) * heads, multiplications(p), Forward<T>::unit, &f);
}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
