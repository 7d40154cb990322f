// Backward: dq, dk, dv and d_bias in one pass over the scores, five products per tile.
//
// A unit of work is the queries of one key head of one sequence, or a chunk of them: dq is written once, dk
// and dv are summed in memory of the unit. Where there are chunks, their sums are added in order by a second
// parallel loop. How many chunks there are depends on shapes alone, so the bits are the same whatever the
// number of threads.
#pragma once
#include "band.h"
#include "gradient_bias.h"
#include "gradient_tile.h"
#include "sums.h"

namespace attn::cpu::ATTN_ISA {
namespace {

template <class T>
struct BackwardSpace {
  GradientSpace tile;
  Real* sums;  // dk of all keys, then dv

  BackwardSpace(Carver& c, const Problem* p, const Backward* b, int64_t tiles, int64_t keys, int64_t size)
      : tile(c, *p, *b, tiles, keys, static_cast<const T*>(nullptr)), sums(c.take<Real>(size)) {}
};

// What the units of a call share.
struct SharedSpace {
  Real *partials, *deltas;

  SharedSpace(Carver& c, const Problem& p, int64_t chunks, bool needs_deltas) {
    const int64_t wide = round_up(p.D, kWidth) + round_up(p.Dv, kWidth);
    partials = c.take<Real>(chunks > 1 ? chunks * p.B * p.Hkv * p.S * wide : 0);
    deltas = c.take<Real>(needs_deltas ? p.B * p.Hq * p.L : 0);
  }
};

// Enough for some dozen cores; a chunk of fewer rows would cost more to add than it saves.
constexpr int64_t kTilesBytes = 320 * 1024;
constexpr int64_t kUnitsWanted = 16, kChunkRows = 1024, kMaxChunks = 8;

// Tiles of queries that meet a tile of keys together, so that the keys and their sums come from far less
// often: as many as stay in the second cache beside them.
ATTN_INLINE int64_t tiles_together(const Problem& p) {
  const int64_t each = (3 * p.D + 2 * p.Dv) * kQueries * static_cast<int64_t>(sizeof(Real));
  return clamp(kTilesBytes / each, 1, kMostTiles);
}

ATTN_INLINE int64_t chunks_of(const Problem& p) {
  const int64_t heads = sequences(p) * p.Hkv, rows = p.L / most<int64_t>(1, sequences(p)) * (p.Hq / p.Hkv);
  if (heads == 0) return 1;
  return clamp(least(kUnitsWanted / heads, rows / kChunkRows), 1, kMaxChunks);
}

template <class T>
struct BackwardPass {
  const Problem& p;
  const Backward& b;
  const int64_t chunks;
  const SharedSpace shared;
  const bool bias_here, bias_later;  // whether this pass writes d_bias, or one after it
  const int64_t tiles = tiles_together(p), wide_k = round_up(p.D, kWidth), wide_v = round_up(p.Dv, kWidth);

  // dk of keys of one sequence and key head, then dv.
  struct Sums {
    Real *dk, *dv;
  };
  Sums sums_at(Real* base, int64_t keys) const { return {base, base + keys * wide_k}; }
  Sums partial(const Sequence& s, int64_t key_head, int64_t chunk) const {
    const int64_t row = ((chunk * p.B + s.batch) * p.Hkv + key_head) * p.S + s.k_first;
    return sums_at(shared.partials + row * (wide_k + wide_v), s.keys);
  }

  // `n` tiles of queries that were read, against all keys.
  void against_keys(GradientTile<T>& t, int64_t n, const Sums& to) const {
    GradientQueries* tiles = t.w.queries;
    Range all = tiles[0].keys;
    for (int64_t i = 1; i < n; ++i)
      all = {least(all.begin, tiles[i].keys.begin), most(all.end, tiles[i].keys.end)};
    for (int64_t k0 = all.begin; k0 < all.end; k0 += t.step())
      for (int64_t i = 0; i < n; ++i) {
        t.of = tiles + i;
        const int64_t nk = least(t.step(), t.of->keys.end - k0);
        if (nk > 0 && t.go_to_keys(k0, nk)) add_tile(t, to);
      }
  }

  // A tile that is not empty.
  void add_tile(GradientTile<T>& t, const Sums& to) const {
    const GradientSpace& w = t.w;
    GradientQueries& of = *t.of;
    t.gradient();
    if (bias_here) write_bias_tile(t);
    if (p.softcap > 0) times_cap(t.seen, of.nq, t.nk, w.d_cap, w.ds);
    if (t.dropout.on) drop(w.kept, t.dropout.inverse, of.nq, t.nk, w.p);
    const auto rows = [&](const Real* tile) { return rows_of(tile, of.nq, t.nk, w.cells_of_tile); };
    add_to_keys(t.mask, of.q0, of.nq, t.k0, t.nk, rows(w.p), of.g, p.Dv, to.dv + t.k0 * wide_v);
    add_to_keys(t.mask, of.q0, of.nq, t.k0, t.nk, rows(w.ds), of.q, p.D, to.dk + t.k0 * wide_k);
    add_to_queries(t.mask, of.q0, of.nq, t.k0, t.nk, columns_of(w.ds, of.nq, t.nk, w.cells_of_tile),
                   t.summed_k, p.D, of.dq, of.untouched);
    of.untouched = false;
  }

  // The queries [begin, end) of a head, whole tiles up to its last row. Rows from s.queries on are dead.
  void queries(GradientTile<T>& t, int64_t begin, int64_t end, const Sums& to) const {
    const Sequence& s = t.s;
    if (bias_here && end > begin) clear_bias_rows(p, b.d_bias, s.batch, t.head, begin, end - begin);
    const int64_t live = clamp(s.queries, begin, end);
    for (int64_t q0 = begin; q0 < live;) {
      int64_t n = 0;
      for (; n < tiles && q0 < live; ++n, q0 += kQueries) {
        t.read_queries(t.w.queries[n], q0, least<int64_t>(kQueries, live - q0));
        t.find_delta();
      }
      against_keys(t, n, to);
      for (int64_t i = 0; i < n; ++i) {
        const GradientQueries& of = t.w.queries[i];
        write_queries(t, of);
        if (bias_later) memcpy(shared.deltas + of.first, of.delta, static_cast<size_t>(of.nq) * sizeof(Real));
      }
    }
    for (int64_t i = live; i < end; ++i) zero_row(p.D, rows_at<T>(b.dq, s.batch, t.head, s.q_first + i));
  }

  void write_queries(const GradientTile<T>& t, const GradientQueries& of) const {
    T* out = rows_at<T>(b.dq, t.s.batch, t.head, t.s.q_first + of.q0);
    Real factor[kQueries];
    for (Real& f : factor) f = of.untouched ? 0 : static_cast<Real>(p.scale);
    write_sums(factor, of.nq, p.D, of.dq, out, b.dq.row);
  }

  // The keys [begin, end) of s, of which those from s.keys on are 0, out of the sums of all its keys.
  void write_keys(const Sequence& s, int64_t key_head, int64_t begin, int64_t end, const Sums& from) const {
    T* dk = rows_at<T>(b.dk, s.batch, key_head, s.k_first);
    T* dv = rows_at<T>(b.dv, s.batch, key_head, s.k_first);
    for (int64_t j = begin; j < end; ++j) {
      if (j >= s.keys) {
        zero_row(p.D, dk + j * b.dk.row);
        zero_row(p.Dv, dv + j * b.dv.row);
        continue;
      }
      write_row(from.dk + j * wide_k, static_cast<Real>(p.scale), p.D, dk + j * b.dk.row);
      write_row(from.dv + j * wide_v, 1, p.Dv, dv + j * b.dv.row);
    }
  }
  int64_t key_rows(const Sequence& s) const {
    return p.N > 0 ? p.cu_seqlens_k[s.number + 1] - p.cu_seqlens_k[s.number] : p.S;
  }

  // The tiles of queries of a key head, those of its query heads one after another, are cut into chunks of
  // like cost.
  static void unit(void* context, int64_t i) {
    const auto& f = *static_cast<const BackwardPass*>(context);
    const Problem& p = f.p;
    const int64_t chunk = i % f.chunks, key_head = i / f.chunks % p.Hkv, group = p.Hq / p.Hkv;
    const Sequence s(p, i / f.chunks / p.Hkv);
    const int64_t size = s.keys * (f.wide_k + f.wide_v);
    auto w = carve<BackwardSpace<T>>(&p, &f.b, f.tiles, s.keys, f.chunks > 1 ? 0 : size);
    take_tiles();
    w.tile.forget_keys();
    const Sums to = f.chunks > 1 ? f.partial(s, key_head, chunk) : f.sums_at(w.sums, s.keys);
    zero_row(size, to.dk);
    const int64_t total = f.chunks > 1 ? group * cost(Mask(p, s, key_head * group), s.rows) : 0;
    int64_t done = 0;
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
      GradientTile<T> t(p, f.b, s, head, w.tile);
      if (f.chunks == 1) {
        f.queries(t, 0, s.rows, to);
        continue;
      }
      int64_t begin = s.rows, end = s.rows;
      for (int64_t q0 = 0; q0 < s.rows; q0 += kQueries) {
        const int64_t mine = done * f.chunks / total;
        if (mine == chunk) begin = least(begin, q0);
        if (mine > chunk) end = least(end, q0);
        done += tile_cost(t.mask, q0, least<int64_t>(kQueries, s.rows - q0));
      }
      f.queries(t, begin, most(begin, end), to);
    }
    if (f.chunks == 1) f.write_keys(s, key_head, 0, f.key_rows(s), to);
    return_tiles();
  }
  static int64_t tile_cost(const Mask& mask, int64_t q0, int64_t rows) {
    const Range r = mask.keys(q0, rows);
    return r.end - r.begin + 16;
  }
  static int64_t cost(const Mask& mask, int64_t rows) {
    int64_t total = 0;
    for (int64_t q0 = 0; q0 < rows; q0 += kQueries)
      total += tile_cost(mask, q0, least<int64_t>(kQueries, rows - q0));
    return total;
  }

  static constexpr int64_t kKeyParts = 16;  // in which the chunks of a key head are added

  static void add_chunks(void* context, int64_t i) {
    const auto& f = *static_cast<const BackwardPass*>(context);
    const int64_t part = i % kKeyParts, key_head = i / kKeyParts % f.p.Hkv;
    const Sequence s(f.p, i / kKeyParts / f.p.Hkv);
    const int64_t rows = f.key_rows(s), begin = rows * part / kKeyParts, end = rows * (part + 1) / kKeyParts;
    const int64_t last = least(end, s.keys);
    const Sums to = f.partial(s, key_head, 0);
    for (int64_t chunk = 1; chunk < f.chunks && begin < last; ++chunk) {
      const Sums from = f.partial(s, key_head, chunk);
      add_rows(from.dk + begin * f.wide_k, (last - begin) * f.wide_k, to.dk + begin * f.wide_k);
      add_rows(from.dv + begin * f.wide_v, (last - begin) * f.wide_v, to.dv + begin * f.wide_v);
    }
    f.write_keys(s, key_head, begin, end, to);
  }
  static void add_rows(const Real* from, int64_t n, Real* to) {
    for (int64_t i = 0; i < n; i += kWidth) store(to + i, add(load(to + i), load(from + i)));
  }

  // Rows of a packed call that belong to no sequence.
  void zero_rest() const {
    if (p.N == 0) return;
    for (int64_t head = 0; head < p.Hq; ++head)
      for (int64_t i = p.cu_seqlens_q[p.N]; i < p.L; ++i) zero_row(p.D, rows_at<T>(b.dq, 0, head, i));
    for (int64_t head = 0; head < p.Hkv; ++head)
      for (int64_t j = p.cu_seqlens_k[p.N]; j < p.S; ++j) {
        zero_row(p.D, rows_at<T>(b.dk, 0, head, j));
        zero_row(p.Dv, rows_at<T>(b.dv, 0, head, j));
      }
  }
};

template <class T>
void backward_of(const Problem& p, const Backward& b) {
  const int64_t chunks = chunks_of(p), heads = sequences(p) * p.Hkv;
  const bool bias_here = b.d_bias.data && !broadcasts(p, b.d_bias), bias_later = b.d_bias.data && !bias_here;
  Carver counted{0};
  SharedSpace(counted, p, chunks, bias_later);
  Carver real{counted.at > 0 ? reinterpret_cast<uintptr_t>(call_scratch(counted.at)) : 0};
  BackwardPass<T> f{p, b, chunks, SharedSpace(real, p, chunks, bias_later), bias_here, bias_later};
  f.zero_rest();
  run_units(heads * chunks, 2.5 * multiplications(p), BackwardPass<T>::unit, &f);
  if (chunks > 1) run_units(heads * f.kKeyParts, 1e9, BackwardPass<T>::add_chunks, &f);
  if (!bias_later) return;
  BiasGradient<T> bias{p, b, f.shared.deltas, p.ids_q || p.keep.data ? int64_t{64} : kGradientKeys};
  run_units(bias.units(), multiplications(p), BiasGradient<T>::unit, &bias);
}

}  // namespace

void backward(const Problem& p, const Backward& b) {
#if defined(ATTN_DOUBLE)
  backward_of<double>(p, b);
#elif defined(ATTN_PAIRS)
  backward_of<Bf16>(p, b);  // the others are served elsewhere: table.h
#else
  switch (p.dtype) {
    case Dtype::f32:
      return backward_of<float>(p, b);
    case Dtype::bf16:
      return backward_of<Bf16>(p, b);
    default:
      return backward_of<F16>(p, b);
  }
#endif
}

}  // namespace attn::cpu::ATTN_ISA
