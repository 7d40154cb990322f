// Decoding: few queries against a long cache, bound by memory.
//
// A unit of work is a chunk of kChunk keys of one sequence and key head, for all query rows of its group, so
// that each byte of the cache is read once; chunks are combined in their order: the same bits whatever the
// number of threads. Within a unit rows are read in address order, which the prefetcher follows: K for the
// scores of a span of keys, and V of the span before by turns with it, so that the arithmetic is spread
// evenly over what is read.
#pragma once
#include "softmax.h"
#include "tiles.h"

namespace attn::cpu::ATTN_ISA {
namespace {

constexpr int64_t kChunk = 1024, kSpan = 256;  // keys per unit, and per softmax
// Rows are fetched this many bytes ahead, of at most so many rows: the prefetcher stops at each page.
constexpr int64_t kAheadBytes = 6 * 1024, kLookahead = 24;
constexpr int64_t kStep = 16;     // keys by which K and V take turns: whole vectors in every set
constexpr int64_t kManyRows = 3;  // with fewer there is little arithmetic, and they take turns span by span
constexpr int kSums = kRows * kCols > 16 ? 16 : 8;  // vectors of sums in registers, beside what makes them

// What a chunk leaves per row: the sum of exp(s - m) v, then m and l.
struct Partials {
  Real* data;
  int64_t stride, rows, chunks;

  ATTN_INLINE Partials(const Decode& d, Real* at, int64_t longest) {
    data = at;
    stride = round_up(d.Dv, kWidth) + kWidth;
    rows = d.Hq / d.Hkv * d.L;
    chunks = most<int64_t>(1, (longest + kChunk - 1) / kChunk);
  }
  ATTN_INLINE Real* row(int64_t head, int64_t chunk, int64_t r) const {
    return data + ((head * chunks + chunk) * rows + r) * stride;
  }
  ATTN_INLINE int64_t size(const Decode& d) const { return d.B * d.Hkv * chunks * rows * stride; }
};

struct DecodeSpace {
  Real *q, *s, *p;      // scores of a span, probabilities of the one before
  const void **k, **v;  // their rows, and those after them

  DecodeSpace(Carver& c, int64_t rows, int64_t D) {
    q = c.take<Real>(rows * round_up(D, kWidth));
    s = c.take<Real>(rows * kSpan);
    p = c.take<Real>(rows * kSpan);
    k = c.take<const void*>(kSpan + kLookahead);
    v = c.take<const void*>(kSpan + kLookahead);
  }
};

// The maxima of kWidth vectors, of vector i in lane i.
ATTN_INLINE Vec maxima(Vec (&x)[kWidth]) {
  transpose(x);
  ATTN_UNROLL
  for (int n = kWidth / 2; n > 0; n /= 2) ATTN_UNROLL
  for (int i = 0; i < n; ++i) x[i] = max(x[i], x[i + n]);
  return x[0];
}

// Rows that will be wanted, and which part of each is fetched by one pass over their keys: [from, to) of
// `all`.
struct Meanwhile {
  const void* const* rows;
  int64_t begin, end;  // bytes

  ATTN_INLINE Meanwhile(const void* const* rows, int64_t bytes, int64_t from, int64_t to, int64_t all)
      : rows(rows) {
    const int64_t lines = (bytes + 63) / 64;
    begin = lines * from / all * 64;
    end = lines * to / all * 64;
  }
  ATTN_INLINE void fetch(int64_t row) const {
    for (int64_t at = begin; at < end; at += 64) ATTN_PREFETCH_FAR(static_cast<const char*>(rows[row]) + at);
  }
};

// s[r][j] = q[r] . k[j] for R rows and kWidth keys.
template <int R, class T>
ATTN_INLINE void dot_rows(const Real* q, int64_t q_stride, const void* const* k, int64_t D, Real* s,
                          const Meanwhile& other) {
  constexpr int kEach = kWidth / R;  // keys whose sums fill a vector
  constexpr int kKeys = kEach < R ? kEach : R;
  const int64_t whole = D / kWidth * kWidth;
  for (int64_t j0 = 0; j0 < kWidth; j0 += kEach) {
    Vec part[kWidth];
    ATTN_UNROLL
    for (int i = 0; i < kWidth; ++i) part[i] = zero();
    ATTN_UNROLL
    for (int i = 0; i < kEach; i += kKeys) {
      const T* key[kKeys];
      for (int j = 0; j < kKeys; ++j) {
        key[j] = static_cast<const T*>(k[j0 + i + j]);
        other.fetch(j0 + i + j);
      }
      const auto add_products = [&](int64_t d, auto load_key) {
        Vec y[R];
        ATTN_UNROLL
        for (int r = 0; r < R; ++r) y[r] = load(q + r * q_stride + d);
        ATTN_UNROLL
        for (int j = 0; j < kKeys; ++j) {
          const Vec x = load_key(key[j] + d);
          ATTN_UNROLL
          for (int r = 0; r < R; ++r) part[r * kEach + i + j] = fma(x, y[r], part[r * kEach + i + j]);
        }
      };
      for (int64_t d = 0; d < whole; d += kWidth) add_products(d, [](const T* at) { return load(at); });
      if (whole < D) add_products(whole, [&](const T* at) { return load_some(at, D - whole); });
    }
    Real lanes[kWidth];
    store(lanes, sums(part));
    for (int r = 0; r < R; ++r) memcpy(s + r * kSpan + j0, lanes + r * kEach, kEach * sizeof(Real));
  }
}

// out[r] += sum over nk keys of p[r][j] v[j], for R rows and C vectors of columns from d on. The sums go on
// from what is there: beside it products below the normal numbers are lost, and alone they would be slow.
template <int R, int C, class T>
ATTN_INLINE void add_values(const Real* p, const void* const* v, int64_t nk, int64_t d, int64_t width,
                            Real* out, int64_t stride, const Meanwhile& other) {
  Vec total[R][C];
  ATTN_UNROLL
  for (int r = 0; r < R; ++r) ATTN_UNROLL
  for (int c = 0; c < C; ++c) total[r][c] = load(out + r * stride + d + c * kWidth);
  for (int64_t j = 0; j < nk; ++j) {
    const T* value = static_cast<const T*>(v[j]) + d;
    other.fetch(j);
    Vec x[C];
    ATTN_UNROLL
    for (int c = 0; c < C; ++c) x[c] = C == 1 ? load_some(value, width - d) : load(value + c * kWidth);
    ATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec weight = set(p[r * kSpan + j]);
      ATTN_UNROLL
      for (int c = 0; c < C; ++c) total[r][c] = fma(weight, x[c], total[r][c]);
    }
  }
  ATTN_UNROLL
  for (int r = 0; r < R; ++r) ATTN_UNROLL
  for (int c = 0; c < C; ++c) store(out + r * stride + d + c * kWidth, total[r][c]);
}

template <class T>
struct DecodeUnit {
  const Decode& d;
  const Partials partials;

  static constexpr int64_t kBytes = sizeof(T);

  // The rows of the keys of a span, and of those after it; from `end` on, the last one's.
  ATTN_INLINE void find(const Rows& cache, int64_t b, int64_t head, int64_t first, int64_t end,
                        const void** to) const {
    int64_t j = 0;
    for (const int64_t have = least(kSpan + kLookahead, end - first); j < have;) {
      const int64_t page = d.block_table ? (first + j) / d.slots : 0, slot = first + j - page * d.slots;
      const int64_t place = d.block_table ? d.block_table[b * d.pages + page] : b;
      const T* row = rows_at<T>(cache, place, head, slot);
      for (int64_t i = slot; i < d.slots && j < have; ++i, row += cache.row) to[j++] = row;
    }
    for (; j < kSpan + kLookahead; ++j) to[j] = to[j - 1];
  }

  // The rest of the scores of row r, whose query is i of `head`; `first` is the position of s[0], nk how many
  // there are. Returns their maxima.
  ATTN_INLINE Vec finish_scores(int64_t b, int64_t head, int64_t i, int64_t first, int64_t nk,
                                Real* s) const {
    const int64_t at = i + d.lengths[b] - d.L, padded = round_up(nk, kWidth);  // the position of query i
    const int64_t begin = d.left < 0 ? 0 : clamp(at - least(d.left, kFar) - first, 0, nk);
    const int64_t end = d.right < 0 ? nk : clamp(at + least(d.right, kFar) + 1 - first, begin, nk);
    const Vec cap = set(static_cast<Real>(d.softcap)), nothing = set(-kInfinity);
    const Vec uncap = set(static_cast<Real>(d.softcap > 0 ? 1 / d.softcap : 0));
    const Vec slope = set(d.alibi_slopes ? static_cast<Real>(d.alibi_slopes[b * d.Hq + head]) : 0);
    Vec top = nothing;
    for (int64_t j = 0; j < padded; j += kWidth) {
      Vec x = load(s + j);
      if (d.softcap > 0) x = mul(cap, tanh_of(mul(x, uncap)));
      if (d.alibi_slopes) x = nfma(slope, magnitude(add(set(static_cast<Real>(first + j - at)), iota())), x);
      if (j < begin || j + kWidth > end) x = select(lanes_of(bits_between(begin - j, end - j)), x, nothing);
      store(s + j, x);
      top = max(x, top);
    }
    return top;
  }

  // A row's scores to exponentials, with its earlier sums in `out`. Returns their sums.
  ATTN_INLINE Vec exponentials(Real best, int64_t nk, Real* s, Real* out) const {
    const int64_t wide = partials.stride - kWidth;
    Real &m = out[wide], &l = out[wide + 1];
    if (best > m + kSlack) {
      const Vec before = set(m), shrink = exp_of(sub(before, set(best)));
      const Vec f = select(less(set(-kInfinity), before), shrink, zero());
      for (int64_t x = 0; x < wide; x += kWidth) store(out + x, mul(load(out + x), f));
      Real lanes[kWidth];
      store(lanes, f);
      l *= lanes[0];
      m = best;
    }
    const Vec shift = finite_shift(set(m));
    Vec total = zero();
    for (int64_t j = 0; j < nk; j += kWidth) {
      const Vec e = exp_of(sub(load(s + j), shift));
      store(s + j, e);
      total = add(total, e);
    }
    return total;
  }

  // Of as many rows at once as a vector has lanes: what goes across lanes is done for all of them together.
  ATTN_INLINE void soften(int64_t b, int64_t kv_head, int64_t first, int64_t nk, Real* s, Real* out) const {
    const int64_t group = d.Hq / d.Hkv;
    for (int64_t r0 = 0; r0 < partials.rows; r0 += kWidth) {
      const int64_t n = least<int64_t>(kWidth, partials.rows - r0);
      Vec x[kWidth];
      Real of_row[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) {
        const int64_t r = r0 + i;
        x[i] = i < n ? finish_scores(b, kv_head * group + r / d.L, r % d.L, first, nk, s + r * kSpan)
                     : set(-kInfinity);
      }
      store(of_row, maxima(x));
      for (int64_t i = 0; i < kWidth; ++i) {
        const int64_t r = r0 + i;
        x[i] = i < n ? exponentials(of_row[i], nk, s + r * kSpan, out + r * partials.stride) : zero();
      }
      store(of_row, sums(x));
      for (int64_t i = 0; i < n; ++i) out[(r0 + i + 1) * partials.stride - kWidth + 1] += of_row[i];
    }
  }

  // Passes over the keys of a step, by 4, 2 or 1 rows each.
  ATTN_INLINE int64_t passes() const { return partials.rows / 4 + partials.rows / 2 % 2 + partials.rows % 2; }

  // Scores of kWidth keys of a span, from its key j on.
  ATTN_INLINE void multiply_keys(const DecodeSpace& w, int64_t j) const {
    int64_t r = 0, pass = 0;
    for (; r + 3 < partials.rows; r += 4) multiply_keys<4>(w, j, r, pass++);
    for (; r + 1 < partials.rows; r += 2) multiply_keys<2>(w, j, r, pass++);
    if (r < partials.rows) multiply_keys<1>(w, j, r, pass);
  }
  template <int R>
  ATTN_INLINE void multiply_keys(const DecodeSpace& w, int64_t j, int64_t r, int64_t pass) const {
    const int64_t stride = round_up(d.D, kWidth);
    dot_rows<R, T>(w.q + r * stride, stride, w.k + j, d.D, w.s + r * kSpan + j,
                   Meanwhile(w.k + j + rows_ahead(d.D), d.D * kBytes, pass, pass + 1, passes()));
  }

  // What nk <= kStep keys of the span before add to the sums, from its key j on.
  ATTN_INLINE void multiply_values(const DecodeSpace& w, int64_t j, int64_t nk, Real* out) const {
    int64_t r = 0, pass = 0;
    for (; r + 3 < partials.rows; r += 4) multiply_values<4>(w, j, nk, r, pass++, out);
    for (; r + 1 < partials.rows; r += 2) multiply_values<2>(w, j, nk, r, pass++, out);
    if (r < partials.rows) multiply_values<1>(w, j, nk, r, pass, out);
  }
  template <int R>
  ATTN_INLINE void multiply_values(const DecodeSpace& w, int64_t j, int64_t nk, int64_t r, int64_t pass,
                                   Real* out) const {
    constexpr int kMost = kSums / R < 8 ? kSums / R : 8;
    int64_t x = 0;
    for (; x + kMost * kWidth <= d.Dv; x += kMost * kWidth) add_columns<R, kMost>(w, j, nk, r, x, pass, out);
    if constexpr (kMost > 4)
      for (; x + 4 * kWidth <= d.Dv; x += 4 * kWidth) add_columns<R, 4>(w, j, nk, r, x, pass, out);
    for (; x < d.Dv; x += kWidth) add_columns<R, 1>(w, j, nk, r, x, pass, out);
  }
  template <int R, int C>
  ATTN_INLINE void add_columns(const DecodeSpace& w, int64_t j, int64_t nk, int64_t r, int64_t x,
                               int64_t pass, Real* out) const {
    const int64_t stride = partials.stride, at = pass * d.Dv + x;
    add_values<R, C, T>(w.p + r * kSpan + j, w.v + j, nk, x, d.Dv, out + r * stride, stride,
                        Meanwhile(w.v + j + rows_ahead(d.Dv), d.Dv * kBytes, at,
                                  least(at + C * kWidth, (pass + 1) * d.Dv), passes() * d.Dv));
  }

  // Rows of `width` numbers that lie in kAheadBytes.
  ATTN_INLINE int64_t rows_ahead(int64_t width) const {
    return clamp(kAheadBytes / kBytes / most<int64_t>(1, width), 1, kLookahead);
  }

  void run(int64_t b, int64_t kv_head, int64_t chunk) const {
    const int64_t group = d.Hq / d.Hkv, rows = partials.rows, length = d.lengths[b];
    const int64_t q_stride = round_up(d.D, kWidth), stride = partials.stride, index = b * d.Hkv + kv_head;
    Real* out = partials.row(index, chunk, 0);
    for (int64_t r = 0; r < rows; ++r) {
      memset(out + r * stride, 0, static_cast<size_t>(stride) * sizeof(Real));
      out[r * stride + stride - kWidth] = -kInfinity;
    }
    // By the first query's left and the last query's right side.
    const int64_t low = d.left < 0 ? 0 : length - d.L - least(d.left, kFar);
    const int64_t high = d.right < 0 ? length : length + least(d.right, kFar);
    const int64_t begin = most(chunk * kChunk, low), end = least((chunk + 1) * kChunk, least(length, high));
    if (begin >= end) return;
    DecodeSpace w = carve<DecodeSpace>(rows, d.D);
    const Vec scale = set(static_cast<Real>(d.scale));
    for (int64_t r = 0; r < rows; ++r) {
      const T* q = rows_at<T>(d.q, b, kv_head * group + r / d.L, r % d.L);
      for (int64_t x = 0; x < d.D; x += kWidth)
        store(w.q + r * q_stride + x, mul(load_some(q + x, d.D - x), scale));
    }
    const int64_t step = rows < kManyRows ? kSpan : kStep;
    for (int64_t first = begin, before = 0; first < end || before > 0; first += kSpan) {
      const int64_t nk = clamp(end - first, 0, kSpan);
      if (nk > 0) find(d.k, b, kv_head, first, length, w.k);
      if (before > 0) find(d.v, b, kv_head, first - kSpan, length, w.v);
      for (int64_t j0 = 0; j0 < most(nk, before); j0 += step) {
        for (int64_t j = j0; j < least(nk, j0 + step); j += kWidth) multiply_keys(w, j);
        for (int64_t j = j0; j < least(before, j0 + step); j += kStep)
          multiply_values(w, j, least(kStep, before - j), out);
      }
      if (nk > 0) soften(b, kv_head, first, nk, w.s, out);
      Real* s = w.s;
      w.s = w.p;
      w.p = s;
      before = nk;
    }
  }

  // One row of out and lse from its chunks, in their order.
  void combine(int64_t b, int64_t kv_head, int64_t r) const {
    const int64_t index = b * d.Hkv + kv_head, head = kv_head * (d.Hq / d.Hkv) + r / d.L, i = r % d.L;
    const int64_t wide = partials.stride - kWidth,
                  chunks = most<int64_t>(1, (d.lengths[b] + kChunk - 1) / kChunk);
    Real m = -kInfinity, l = 0;
    for (int64_t c = 0; c < chunks; ++c) m = most(m, partials.row(index, c, r)[wide]);
    Real* total = partials.row(index, 0, r);
    const Vec shift = finite_shift(set(m));
    for (int64_t c = 0; c < chunks; ++c) {
      const Real* part = partials.row(index, c, r);
      Real lanes[kWidth];
      const Vec f = exp_of(sub(set(part[wide]), shift));
      store(lanes, f);
      l += lanes[0] * part[wide + 1];
      for (int64_t x = 0; x < wide; x += kWidth)
        store(total + x, c == 0 ? mul(f, load(total + x)) : fma(f, load(part + x), load(total + x)));
    }
    T* out = rows_at<T>(d.out, b, head, i);
    if (l == 0)
      zero_row(d.Dv, out);
    else
      write_row(total, 1 / l, d.Dv, out);
    if (d.lse)
      static_cast<Real*>(d.lse)[(b * d.Hq + head) * d.L + i] =
          l == 0 ? -kInfinity : static_cast<Real>(static_cast<double>(m) + log(static_cast<double>(l)));
  }

  static void chunk_unit(void* context, int64_t i) {
    const auto& u = *static_cast<const DecodeUnit*>(context);
    const int64_t chunk = i % u.partials.chunks, index = i / u.partials.chunks, b = index / u.d.Hkv;
    if (chunk > 0 && chunk * kChunk >= u.d.lengths[b]) return;
    u.run(b, index % u.d.Hkv, chunk);
  }
  static void row_unit(void* context, int64_t i) {
    const auto& u = *static_cast<const DecodeUnit*>(context);
    for (int64_t r = 0; r < u.partials.rows; ++r) u.combine(i / u.d.Hkv, i % u.d.Hkv, r);
  }
};

template <class T>
void decode_of(const Decode& d) {
  int64_t longest = 0;
  double keys = 0;
  for (int64_t b = 0; b < d.B; ++b) {
    longest = most<int64_t>(longest, d.lengths[b]);
    keys += d.lengths[b];
  }
  const Partials counted(d, nullptr, longest);
  auto* data = static_cast<Real*>(call_scratch(static_cast<size_t>(counted.size(d)) * sizeof(Real)));
  DecodeUnit<T> u{d, Partials(d, data, longest)};
  const auto heads = static_cast<double>(d.Hq * d.L);
  run_units(d.B * d.Hkv * counted.chunks, keys * heads * static_cast<double>(d.D + d.Dv),
            DecodeUnit<T>::chunk_unit, &u);
  run_units(d.B * d.Hkv, static_cast<double>(counted.size(d)), DecodeUnit<T>::row_unit, &u);
}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
