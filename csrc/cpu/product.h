// Products of small matrices: one block of accumulators in registers serves every product of every kernel.
//
// A block is up to kRows rows by up to kCols vectors of columns. Its right operand B is rows of columns, read
// by vectors (in place: rows of V, K, Q, or a packed Q^T); of the left operand A single cells are
// broadcast, which lie along
//   kAlongRows:    A(r, k) = a[r * as + k]     rows of K, V in place; rows of a score tile
//   kAlongColumns: A(r, k) = a[k * as + r]     columns of a score tile (one key: the queries side by side)
//
//   multiply_rows<Side>(rows, columns, depth, a, as, b, bs, c, cs, init)
// C (rows x columns, stride cs) = A B, or += where init is false, for up to kRows rows and any depth; columns
// are rounded up to vectors, so that rows of b and c must have round_up(columns, kWidth) numbers. Operands
// and depth count cells (operands.h). A block multiplies products of pairs by `factor` where init is true.
#pragma once
#include "operands.h"

namespace attn::cpu::ATTN_ISA {
namespace {

enum Side { kAlongRows, kAlongColumns };

}  // namespace
}  // namespace attn::cpu::ATTN_ISA

#ifdef ATTN_TILES
#include "product_amx.h"
#else
namespace attn::cpu::ATTN_ISA {
namespace {

template <int M, int N, Side side>
ATTN_INLINE void accumulate(Vec (&acc)[M][N], const Cell* a, int64_t as, const Cell* b, int64_t bs,
                            int64_t depth) {
  const Cell* a3 = a + 3 * as;
  for (int64_t k = 0; k < depth; ++k) {
    Cells right[N];
    ATTN_UNROLL
    for (int j = 0; j < N; ++j) right[j] = load_cells(b + j * kWidth);
    b += bs;
    ATTN_UNROLL
    for (int r = 0; r < M; ++r) {
      const Cells left = broadcast(side == kAlongColumns ? a + r : r < 3 ? a + r * as : a3 + (r - 3) * as);
      ATTN_UNROLL
      for (int j = 0; j < N; ++j) acc[r][j] = multiply_add(left, right[j], acc[r][j]);
    }
    a += side == kAlongColumns ? as : 1;
    a3 += 1;
  }
}

template <int M, int N, Side side>
ATTN_NOINLINE void block(int64_t depth, const Cell* a, int64_t as, const Cell* b, int64_t bs, Real* c,
                         int64_t cs, bool init, Real factor) {
  Vec acc[M][N];
  ATTN_UNROLL
  for (int r = 0; r < M; ++r) ATTN_UNROLL
  for (int j = 0; j < N; ++j) acc[r][j] = zero();
  accumulate<M, N, side>(acc, a, as, b, bs, depth);
  if constexpr (kPerCell > 1)
    if (init) {
      const Vec times = set(factor);
      ATTN_UNROLL
      for (int r = 0; r < M; ++r) ATTN_UNROLL
      for (int j = 0; j < N; ++j) acc[r][j] = mul(acc[r][j], times);
    }
  // What was there is added last: a sum over many tiles then rounds as often as there are tiles, not terms.
  ATTN_UNROLL
  for (int r = 0; r < M; ++r) ATTN_UNROLL
  for (int j = 0; j < N; ++j) {
    Real* at = c + r * cs + j * kWidth;
    store(at, init ? acc[r][j] : add(load(at), acc[r][j]));
  }
}

using BlockFunction = void (*)(int64_t, const Cell*, int64_t, const Cell*, int64_t, Real*, int64_t, bool,
                               Real);

// The blocks of M rows, by their number of vectors less one.
template <int M, Side side>
struct BlocksOf {
  static constexpr BlockFunction by_columns[4] = {
      block<M, 1, side>, block<M, 2, side>,     block < M, kCols < 3 ? kCols : 3, side >,
      block < M,         kCols < 4 ? kCols : 4, side > };
};
template <Side side>
struct Blocks {
  static constexpr const BlockFunction* by_rows[kRows] = {
      BlocksOf<1, side>::by_columns, BlocksOf<2, side>::by_columns, BlocksOf<3, side>::by_columns,
      BlocksOf<4, side>::by_columns, BlocksOf<5, side>::by_columns, BlocksOf<6, side>::by_columns};
};

// One block, of `vectors` columns.
template <Side side>
ATTN_INLINE void multiply_block(int64_t rows, int64_t vectors, int64_t depth, const Cell* a, int64_t as,
                                const Cell* b, int64_t bs, Real* c, int64_t cs, bool init, Real factor) {
  Blocks<side>::by_rows[rows - 1][vectors - 1](depth, a, as, b, bs, c, cs, init, factor);
}

// A unit of work begins and ends with these.
ATTN_INLINE void take_tiles() {}
ATTN_INLINE void return_tiles() {}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
#endif

namespace attn::cpu::ATTN_ISA {
namespace {

// One row of blocks: up to kRows rows, any columns.
template <Side side>
ATTN_INLINE void multiply_rows(int64_t rows, int64_t columns, int64_t depth, const Cell* a, int64_t as,
                               const Cell* b, int64_t bs, Real* c, int64_t cs, bool init) {
  for (int64_t j = 0; j < columns; j += kCols * kWidth) {
    const int64_t vectors = least<int64_t>(kCols, (columns - j + kWidth - 1) / kWidth);
    multiply_block<side>(rows, vectors, depth, a, as, b + j, bs, c + j, cs, init, 1);
  }
}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
