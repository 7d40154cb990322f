// Decoding: few queries against a long cache, bound by memory.
//
// A unit of work is a chunk of kChunk keys of one sequence and key head, for all query rows of its group, so
// that each byte of the cache is read once; chunks are combined in their order: the same bits whatever the
// number of threads. Within a unit keys are walked in address order, one row of K, then one row of V: what
// the prefetcher follows.
#pragma once
#include "softmax.h"
#include "tiles.h"

namespace attn::cpu::ATTN_ISA {
namespace {

constexpr int64_t kChunk = 1024, kSpan = 256;  // keys per unit, and per pass over its rows
// Rows are fetched this many bytes ahead, of at most so many rows: the prefetcher stops at each page.
constexpr int64_t kAheadBytes = 6 * 1024, kLookahead = 24;

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
  Real *q, *s;
  const void **k, **v;  // rows of the keys of a span, and of those after it

  DecodeSpace(Carver& c, int64_t rows, int64_t D) {
    q = c.take<Real>(rows * round_up(D, kWidth));
    s = c.take<Real>(rows * kSpan);
    k = c.take<const void*>(kSpan + kLookahead);
    v = c.take<const void*>(kSpan + kLookahead);
  }
};

// Sums across the lanes of kWidth vectors, of vector i in lane i.
ATTN_INLINE Vec sums(Vec (&x)[kWidth]) {
  transpose(x);
  ATTN_UNROLL
  for (int n = kWidth / 2; n > 0; n /= 2) ATTN_UNROLL
  for (int i = 0; i < n; ++i) x[i] = add(x[i], x[i + n]);
  return x[0];
}

// Rows of `width` numbers that lie in kAheadBytes.
template <class T>
ATTN_INLINE int64_t rows_ahead(int64_t width) {
  return clamp(kAheadBytes / static_cast<int64_t>(sizeof(T)) / most<int64_t>(1, width), 1, kLookahead);
}

// s[r][j] = q[r] . k[j] for R rows. Meanwhile the rows `ahead` further on are fetched, where it is not 0.
template <int R, class T>
ATTN_INLINE void dot_rows(int64_t ahead, const Real* q, int64_t q_stride, const void* const* k, int64_t nk,
                          int64_t D, Real* s) {
  const int64_t whole = D / kWidth * kWidth;
  for (int64_t j0 = 0; j0 < nk; j0 += kWidth) {
    Vec part[R][kWidth];
    const int64_t n = least<int64_t>(kWidth, nk - j0);
    for (int64_t j = 0; j < kWidth; ++j) {
      if (j >= n) {
        ATTN_UNROLL
        for (int r = 0; r < R; ++r) part[r][j] = zero();
        continue;
      }
      const T* key = static_cast<const T*>(k[j0 + j]);
      if (ahead) Ahead(static_cast<const T*>(k[j0 + j + ahead]), 0, D).fetch_far();
      Vec a[R], b[R];
      ATTN_UNROLL
      for (int r = 0; r < R; ++r) a[r] = b[r] = zero();
      int64_t d = 0;
      for (; d + kWidth < whole; d += 2 * kWidth) {
        const Vec x = load(key + d), y = load(key + d + kWidth);
        ATTN_UNROLL
        for (int r = 0; r < R; ++r) {
          a[r] = fma(x, load(q + r * q_stride + d), a[r]);
          b[r] = fma(y, load(q + r * q_stride + d + kWidth), b[r]);
        }
      }
      for (; d < D; d += kWidth) {
        const Vec x = load_some(key + d, D - d);
        ATTN_UNROLL
        for (int r = 0; r < R; ++r) a[r] = fma(x, load(q + r * q_stride + d), a[r]);
      }
      ATTN_UNROLL
      for (int r = 0; r < R; ++r) part[r][j] = add(a[r], b[r]);
    }
    ATTN_UNROLL
    for (int r = 0; r < R; ++r) store(s + r * kSpan + j0, sums(part[r]));
  }
}

// out[r] += sum over K keys of p[r][j] v[j], for R rows.
template <int R, int K, class T>
ATTN_INLINE void add_values(const Real* p, const void* const* v, int64_t width, Real* out, int64_t stride) {
  Vec weight[R][K];
  ATTN_UNROLL
  for (int r = 0; r < R; ++r) ATTN_UNROLL
  for (int j = 0; j < K; ++j) weight[r][j] = set(p[r * kSpan + j]);
  const int64_t whole = width / kWidth * kWidth;
  for (int64_t d = 0; d < width; d += kWidth) {
    Vec total[R];
    ATTN_UNROLL
    for (int r = 0; r < R; ++r) total[r] = load(out + r * stride + d);
    ATTN_UNROLL
    for (int j = 0; j < K; ++j) {
      const T* value = static_cast<const T*>(v[j]) + d;
      const Vec x = d < whole ? load(value) : load_some(value, width - d);
      ATTN_UNROLL
      for (int r = 0; r < R; ++r) total[r] = fma(weight[r][j], x, total[r]);
    }
    ATTN_UNROLL
    for (int r = 0; r < R; ++r) store(out + r * stride + d, total[r]);
  }
}

template <class T>
struct DecodeUnit {
  const Decode& d;
  const Partials partials;

  ATTN_INLINE const T* key_row(const Rows& cache, int64_t b, int64_t head, int64_t j) const {
    const int64_t place = d.block_table ? d.block_table[b * d.pages + j / d.slots] : b;
    return rows_at<T>(cache, place, head, d.block_table ? j % d.slots : j);
  }

  // The rest of a row's scores, and its exponentials; `first` is the position of s[0], nk its length.
  ATTN_INLINE void soften(int64_t b, int64_t head, int64_t i, int64_t first, int64_t nk, Real* s,
                          Real* out) const {
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
    Real lanes[kWidth];
    store(lanes, top);
    Real best = lanes[0];
    for (int n = 1; n < kWidth; ++n) best = lanes[n] > best ? lanes[n] : best;
    const int64_t stride = partials.stride;
    Real &m = out[stride - kWidth], &l = out[stride - kWidth + 1];
    if (best > m + kSlack) {
      const Vec before = set(m), f = select(less(nothing, before), exp_of(sub(before, set(best))), zero());
      for (int64_t x = 0; x < stride - kWidth; x += kWidth) store(out + x, mul(load(out + x), f));
      store(lanes, f);
      l *= lanes[0];
      m = best;
    }
    const Vec shift = finite_shift(set(m));
    Vec total = zero();
    for (int64_t j = 0; j < padded; j += kWidth) {
      const Vec e = exp_of(sub(load(s + j), shift));
      store(s + j, e);
      total = add(total, e);
    }
    l += sum(total);
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
    const int64_t ahead_k = rows_ahead<T>(d.D), ahead_v = rows_ahead<T>(d.Dv);
    for (int64_t first = begin; first < end; first += kSpan) {
      const int64_t nk = least(kSpan, end - first);
      for (int64_t j = 0; j < nk + kLookahead; ++j) {
        const int64_t at = least(first + j, length - 1);
        w.k[j] = key_row(d.k, b, kv_head, at);
        w.v[j] = key_row(d.v, b, kv_head, at);
      }
      int64_t r = 0;
      for (; r + 3 < rows; r += 4)
        dot_rows<4, T>(r == 0 ? ahead_k : 0, w.q + r * q_stride, q_stride, w.k, nk, d.D, w.s + r * kSpan);
      for (; r + 1 < rows; r += 2)
        dot_rows<2, T>(r == 0 ? ahead_k : 0, w.q + r * q_stride, q_stride, w.k, nk, d.D, w.s + r * kSpan);
      if (r < rows)
        dot_rows<1, T>(r == 0 ? ahead_k : 0, w.q + r * q_stride, q_stride, w.k, nk, d.D, w.s + r * kSpan);
      for (r = 0; r < rows; ++r)
        soften(b, kv_head * group + r / d.L, r % d.L, first, nk, w.s + r * kSpan, out + r * stride);
      int64_t j = 0;
      for (; j + 3 < nk; j += 4) {
        for (int64_t i = 0; i < 4; ++i)
          Ahead(static_cast<const T*>(w.v[j + i + ahead_v]), 0, d.Dv).fetch_far();
        r = 0;
        if constexpr (kRows * kCols > 16)  // with fewer registers they would be spilled
          for (; r + 3 < rows; r += 4)
            add_values<4, 4, T>(w.s + r * kSpan + j, w.v + j, d.Dv, out + r * stride, stride);
        for (; r + 1 < rows; r += 2)
          add_values<2, 4, T>(w.s + r * kSpan + j, w.v + j, d.Dv, out + r * stride, stride);
        if (r < rows) add_values<1, 4, T>(w.s + r * kSpan + j, w.v + j, d.Dv, out + r * stride, stride);
      }
      for (; j < nk; ++j)
        for (r = 0; r < rows; ++r)
          add_values<1, 1, T>(w.s + r * kSpan + j, w.v + j, d.Dv, out + r * stride, stride);
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
