// What backward knows of each query row before it meets a key, and the kernel that finds it.
//
// P = 2^((s - m) log2(e) - r) with m and l of forward and r = log2(l); folded, for light calls of 16 bits, r
// has m log2(e) in it. A dead row has r = inf, and so P = 0. dS = P (dP - delta) with delta = rowsum(P dP) -
// d_lse; but for what returned weights add to dP, rowsum(P dP) is rowsum(out d_out).
#pragma once
#include "schedule.cuh"

namespace attn::cuda {

constexpr int kRowPad = 128;  // the rows of a head are padded to this with dead ones: readers need no test

// Floats of scratch, `padded` per head.
struct RowStatistics {
  float *m, *r, *delta;
  int64_t padded;

  // Of the first row of a head. A packed sequence begins at a multiple of kRowPad, behind those before it.
  ATTN_DEV int64_t first(const Problem& p, const Sequence& s, int head) const {
    if (p.N == 0) return (s.batch * p.Hq + head) * padded;
    return head * padded + (s.q_first + int64_t{kRowPad} * s.number) / kRowPad * kRowPad;
  }
};

inline int64_t padded_rows(const Problem& p) { return ((p.L + kRowPad - 1) / kRowPad + p.N) * kRowPad; }

// The statistics of kRowPad rows of a head; eight lanes share a row.
template <class T>
struct BackwardRows {
  struct Params {
    Call c;
    Rows d_out;
    const float* d_lse;
    RowStatistics to;
    bool folded, wide;  // wide: whether 16 bytes of a row can be read at once
    bool of_out;        // whether rowsum(out d_out) belongs to delta
  };
  static constexpr int kThreads = 128, kSmem = 0, kMinBlocks = 1;
  static constexpr int kLanes = 8, kWide = 16 / static_cast<int>(sizeof(T));

  ATTN_DEV static void run(const Params& x) {
    const Problem& p = x.c.p;
    const QueryTile<kRowPad> t(x.c, static_cast<int>(bid_x()));
    const Sequence& s = t.s;
    if (!t.exists || t.q0 >= s.queries) return;
    const T* out = static_cast<const T*>(p.out.data) + s.batch * p.out.batch + t.head * p.out.head;
    const T* grad = static_cast<const T*>(x.d_out.data) + s.batch * x.d_out.batch + t.head * x.d_out.head;
    const int64_t given = (s.batch * p.Hq + t.head) * p.L + s.q_first, to = x.to.first(p, s, t.head);
    for (int i = t.q0 + static_cast<int>(tid()) / kLanes; i < t.q0 + kRowPad; i += kThreads / kLanes) {
      const bool real = i < s.queries;
      const int64_t row = s.q_first + i;
      float delta = 0.f;
      if (real && x.of_out)
        delta = dot(out + row * p.out.row, grad + row * x.d_out.row, static_cast<int>(p.Dv), x.wide);
      for (int mask = kLanes / 2; mask > 0; mask /= 2) delta += shfl_xor(delta, mask);
      if (tid() % kLanes != 0) continue;
      const float l = real ? ldg(static_cast<const float*>(p.l) + given + i) : 0.f;
      const float m = l == 0.f ? 0.f : ldg(static_cast<const float*>(p.m) + given + i);
      if (x.d_lse && real) delta -= ldg(x.d_lse + given + i);
      const float r = l == 0.f ? INFINITY : log2f(l);
      stg(x.to.m + to + i, m);
      stg(x.to.r + to + i, x.folded ? r + m * static_cast<float>(kLog2e) : r);
      stg(x.to.delta + to + i, l == 0.f ? 0.f : delta);
    }
  }

 private:
  // This lane's part of the sum.
  ATTN_DEV static float dot(const T* a, const T* b, int n, bool wide) {
    float total = 0.f;
    for (int d = static_cast<int>(tid()) % kLanes * kWide; d < n; d += kLanes * kWide) {
      T of_a[kWide], of_b[kWide];
      read(a + d, n - d, wide, of_a);
      read(b + d, n - d, wide, of_b);
      ATTN_UNROLL
      for (int e = 0; e < kWide; ++e) total += to_float(of_a[e]) * to_float(of_b[e]);
    }
    return total;
  }
  ATTN_DEV static void read(const T* from, int left, bool wide, T (&to)[kWide]) {
    if (wide) {
      const u32x4 v = ldg(reinterpret_cast<const u32x4*>(from));
      memcpy(to, &v, sizeof v);
    } else {
      ATTN_UNROLL
      for (int e = 0; e < kWide; ++e) to[e] = e < left ? ldg(from + e) : T{};
    }
  }
};

}  // namespace attn::cuda
