// The gradient of a bias, dS summed over the dims that the bias broadcasts along.
//
// Where it broadcasts along none, each dS is met once and goes out in the main pass. Else a pass of its own
// computes dS anew: a unit owns cells of the bias and sums what belongs to them in the order of batch, head,
// query and key.
#pragma once
#include "gradient_tile.h"
#include "weights.h"

namespace attn::cpu::ATTN_ISA {
namespace {

// body(pointer) with the bias gradient's own type.
template <class Body>
ATTN_INLINE void typed(const Dense& d, Body body) {
  switch (d.dtype) {
    case Dtype::f32:
      return body(static_cast<float*>(d.data));
    case Dtype::bf16:
      return body(static_cast<Bf16*>(d.data));
    case Dtype::f16:
      return body(static_cast<F16*>(d.data));
    default:
      return body(static_cast<double*>(d.data));
  }
}

ATTN_INLINE bool broadcasts(const Problem& p, const Dense& d) {
  return (d.batch == 0 && p.B > 1) || (d.head == 0 && p.Hq > 1) || (d.row == 0 && p.L > 1) ||
         (d.col == 0 && p.S > 1);
}

// Of a bias that broadcasts along nothing: `rows` rows as 0, then its visible tiles.
ATTN_INLINE void clear_bias_rows(const Problem& p, const Dense& d, int64_t batch, int64_t head, int64_t q0,
                                 int64_t rows) {
  typed(d, [&](auto* to) { zero_row(rows * p.S, to + batch * d.batch + head * d.head + q0 * d.row); });
}
template <class T>
ATTN_INLINE void write_bias_tile(const GradientTile<T>& t) {
  const Dense& d = t.b.d_bias;
  typed(d, [&](auto* to) {
    to += t.s.batch * d.batch + t.head * d.head + t.of->q0 * d.row + t.k0 * d.col;
    write_transposed(t.w.ds, 1, t.of->nq, t.nk, to, d.row);
  });
}

template <class T>
struct BiasSpace {
  GradientSpace tile;
  Real* sums;  // [key][query]

  BiasSpace(Carver& c, const Problem* p, const Backward* b)
      : tile(c, *p, *b, 1, p->S, static_cast<const T*>(nullptr)),
        sums(c.take<Real>(kGradientKeys * kQueries)) {}
};

template <class T>
struct BiasGradient {
  const Problem& p;
  const Backward& b;
  const Real* deltas;  // (B, Hq, L), from the main pass
  int64_t step;        // keys per tile

  // How much of a dim one unit covers, `each` where the bias has that dim and all of it where it broadcasts.
  struct Part {
    int64_t begin, end;

    ATTN_INLINE Part(int64_t& index, int64_t size, int64_t each, bool whole) {
      const int64_t parts = whole ? 1 : (size + each - 1) / each;
      begin = index % parts * each;
      end = whole ? size : least(size, begin + each);
      index /= parts;
    }
  };

  int64_t units() const {
    const Dense& d = b.d_bias;
    const int64_t tiles_q = (p.L + kQueries - 1) / kQueries, tiles_k = (p.S + step - 1) / step;
    return (d.batch ? p.B : 1) * (d.head ? p.Hq : 1) * (d.row ? tiles_q : 1) * (d.col ? tiles_k : 1);
  }

  static void unit(void* context, int64_t i) {
    const auto& f = *static_cast<const BiasGradient*>(context);
    const Dense& d = f.b.d_bias;
    const Part keys(i, f.p.S, f.step, d.col == 0), rows(i, f.p.L, kQueries, d.row == 0);
    const Part heads(i, f.p.Hq, 1, d.head == 0), batch(i, f.p.B, 1, d.batch == 0);
    BiasSpace<T> w = carve<BiasSpace<T>>(&f.p, &f.b);
    take_tiles();
    zero_row(kGradientKeys * kQueries, w.sums);
    for (int64_t n = batch.begin; n < batch.end; ++n) {
      const Sequence s(f.p, n);
      for (int64_t head = heads.begin; head < heads.end; ++head) f.add_head(s, head, rows, keys, w);
    }
    const int64_t high = d.row ? rows.end - rows.begin : 1, wide = d.col ? keys.end - keys.begin : 1;
    if (d.col == 0) sum_keys(least(f.step, f.p.S), w.sums);
    if (d.row == 0) sum_queries(wide, w.sums);
    typed(d, [&](auto* to) {
      to += batch.begin * d.batch + heads.begin * d.head + rows.begin * d.row + keys.begin * d.col;
      write_transposed(w.sums, 1, high, wide, to, d.row);
    });
    return_tiles();
  }

  void add_head(const Sequence& s, int64_t head, const Part& rows, const Part& keys, BiasSpace<T>& w) const {
    GradientTile<T> t(p, b, s, head, w.tile);
    w.tile.forget_keys();
    for (int64_t q0 = rows.begin; q0 < least(rows.end, s.queries); q0 += kQueries) {
      const int64_t nq = least<int64_t>(kQueries, s.queries - q0);
      const Range r = t.mask.keys(q0, nq);
      const int64_t end = least(keys.end, r.end);
      if (keys.end <= r.begin || keys.begin >= end) continue;
      t.read_queries(w.tile.queries[0], q0, nq);
      memcpy(t.of->delta, deltas + t.of->first, static_cast<size_t>(nq) * sizeof(Real));
      for (int64_t k0 = keys.begin; k0 < end; k0 += step) {
        const int64_t nk = least(step, end - k0);
        if (!t.go_to_keys(k0, nk)) continue;
        t.gradient();
        add_tile(nq, nk, w.tile.ds, w.sums);
      }
    }
  }

  static void add_tile(int64_t nq, int64_t nk, const Real* ds, Real* sums) {
    for (int64_t j = 0; j < nk; ++j)
      for (int64_t c = 0; c < nq; c += kWidth) {
        const int64_t at = j * kQueries + c;
        const Vec x = select(lanes_of(bits_between(0, nq - c)), load(ds + at), zero());
        store(sums + at, add(load(sums + at), x));
      }
  }
  // All keys into the first.
  static void sum_keys(int64_t nk, Real* sums) {
    for (int64_t j = 1; j < nk; ++j)
      for (int64_t c = 0; c < kQueries; c += kWidth)
        store(sums + c, add(load(sums + c), load(sums + j * kQueries + c)));
  }
  // All queries of each key into the first.
  static void sum_queries(int64_t nk, Real* sums) {
    for (int64_t j = 0; j < nk; ++j) {
      Vec total = zero();
      for (int64_t c = 0; c < kQueries; c += kWidth) total = add(total, load(sums + j * kQueries + c));
      sums[j * kQueries] = sum(total);
    }
  }
};

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
