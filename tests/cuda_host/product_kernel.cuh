// c = a b^T with 64x64 tiles of 16-bit elements: small, and of every primitive that a kernel's main loop
// takes.
#pragma once
#include "../../csrc/cuda/prim.cuh"

namespace product {

namespace prim = attn::cuda::prim;

template <class T>
struct Product {
  static constexpr int kThreads = 128, kRows = 64, kDepth = 64, kStage = kRows * kDepth * 2,
                       kSmem = 4 * kStage;
  static constexpr int kMinBlocks = 1;

  struct Params {
    const T *a, *b;  // (rows, depth), (cols, depth), contiguous
    float* c;        // (rows, cols)
    int rows, cols, depth;
  };

  // The 16-byte chunk of a row, swizzled so that eight rows of one column lie in eight banks.
  ATTN_DEV static uint32_t at(uint32_t tile, int row, int chunk) {
    return tile + uint32_t(row * kDepth * 2 + (chunk ^ (row & 7)) * 16);
  }

  ATTN_DEV static void load(uint32_t tile, const T* from, int row0, int rows, int depth0, int depth) {
    ATTN_UNROLL
    for (int i = 0; i < kRows * 8 / kThreads; ++i) {
      const int x = int(prim::tid()) + i * kThreads, row = x / 8, chunk = x % 8;
      const bool inside = row0 + row < rows && depth0 + chunk * 8 < depth;
      const T* source = from + (inside ? int64_t(row0 + row) * depth + depth0 + chunk * 8 : 0);
      prim::cp_async_16(at(tile, row, chunk), source, inside ? 16 : 0);
    }
  }

  ATTN_DEV static void run(const Params& p) {
    const uint32_t smem = prim::smem_base();
    const int lane = int(prim::lane()), warp = int(prim::tid() >> 5);
    const int row0 = int(prim::bid_x()) * kRows, col0 = int(prim::bid_y()) * kRows;
    const int steps = (p.depth + kDepth - 1) / kDepth;
    float c[8][4];
    ATTN_UNROLL
    for (int n = 0; n < 8; ++n) ATTN_UNROLL
    for (int e = 0; e < 4; ++e) c[n][e] = 0.f;

    load(smem, p.a, row0, p.rows, 0, p.depth);
    load(smem + kStage, p.b, col0, p.cols, 0, p.depth);
    prim::cp_async_commit();
    for (int step = 0; step < steps; ++step) {
      const uint32_t a = smem + uint32_t(step & 1) * 2 * kStage, b = a + kStage;
      const uint32_t next = smem + uint32_t((step + 1) & 1) * 2 * kStage;
      if (step + 1 < steps) {
        load(next, p.a, row0, p.rows, (step + 1) * kDepth, p.depth);
        load(next + kStage, p.b, col0, p.cols, (step + 1) * kDepth, p.depth);
      }
      prim::cp_async_commit();
      prim::cp_async_wait<1>();
      prim::sync_threads();
      const int r = lane & 7, m = lane >> 3;  // of ldmatrix: row and matrix
      ATTN_UNROLL
      for (int k = 0; k < kDepth / 16; ++k) {
        uint32_t af[4];
        prim::ldmatrix_x4(af, at(a, warp * 16 + (m & 1) * 8 + r, k * 2 + (m >> 1)));
        ATTN_UNROLL
        for (int n = 0; n < 8; n += 2) {
          uint32_t bf[4];
          prim::ldmatrix_x4(bf, at(b, n * 8 + (m >> 1) * 8 + r, k * 2 + (m & 1)));
          prim::mma_m16n8k16<T>(c[n], af, bf[0], bf[1]);
          prim::mma_m16n8k16<T>(c[n + 1], af, bf[2], bf[3]);
        }
      }
      prim::sync_threads();
    }
    ATTN_UNROLL
    for (int n = 0; n < 8; ++n) ATTN_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int row = row0 + warp * 16 + (lane >> 2) + (e >> 1) * 8,
                col = col0 + n * 8 + (lane & 3) * 2 + (e & 1);
      if (row < p.rows && col < p.cols) prim::stg(p.c + int64_t(row) * p.cols + col, c[n][e]);
    }
  }
};

}  // namespace product
