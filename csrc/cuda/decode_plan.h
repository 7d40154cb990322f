// How a decoding step is divided among blocks, and where a row's parts and results go.
#pragma once
#include "call.h"
#include "prim.cuh"

namespace attn::cuda {

struct DecodeCall {
  Decode d;
  float scale, softcap, uncap;
  int left, right, capacity;
  int q_access, k_access, v_access;
  int splits, row_tiles;
  float* scratch;  // of each row and split: m and l of all, then the sums
};

// One query of one head.
struct DecodeRow {
  const DecodeCall& c;
  int64_t b, head, i, index;

  ATTN_DEV DecodeRow(const DecodeCall& call, int b_, int head_, int i_)
      : c(call), b(b_), head(head_), i(i_), index((b * call.d.Hq + head) * call.d.L + i) {}

  ATTN_DEV float* stats(int split) const { return c.scratch + 2 * (index * c.splits + split); }
  ATTN_DEV float* sums(int split) const {
    return c.scratch + 2 * c.d.B * c.d.Hq * c.d.L * c.splits + (index * c.splits + split) * c.d.Dv;
  }
  template <class T>
  ATTN_DEV T* out() const {
    return static_cast<T*>(c.d.out.data) + b * c.d.out.batch + head * c.d.out.head + i * c.d.out.row;
  }
  ATTN_DEV void lse(float m, float l) const {
    if (c.d.lse) prim::stg(static_cast<float*>(c.d.lse) + index, l == 0.f ? -INFINITY : m + logf(l));
  }

  // By a warp: what a split knows of the row, whose result it is where there is one split.
  ATTN_DEV void finish(int split, float m, float l) const {
    if (prim::lane() != 0) return;
    if (c.splits == 1) {
      lse(m, l);
    } else {
      prim::stg(stats(split), m);
      prim::stg(stats(split) + 1, l);
    }
  }
  template <class T>
  ATTN_DEV void put(int split, int d, float x) const {
    if (c.splits == 1)
      prim::stg(out<T>() + d, prim::from_float<T>(x));
    else
      prim::stg(sums(split) + d, x);
  }
};

}  // namespace attn::cuda
