// The operands of products: rows of q, k, v and d_out, and tiles of probabilities, as cells.
//
// A cell is what one multiply-add of a lane takes: a number, or a pair of bf16 where the set multiplies pairs
// (pairs.h), which lie side by side along the sum. In cells, with n / kPerCell rounded up:
//
//   left_operand     rows as they are, [row][width / kPerCell]: the sum goes along them
//   right_operand    [row / kPerCell][width]: the sum goes over the rows
//   pack_columns     rows turned, [width / kPerCell][kQueries]: as the right operand, the sum goes along them
//   columns_of       a tile [key][query] for a sum over its keys, [key / kPerCell][kQueries]; store_columns
//                    makes that of kWidth queries of a few keys, and end_columns what stands behind the last
//   rows_of          the same for a sum over its queries, [key][kQueries / kPerCell]
//   key_operand      rows of keys for a sum over them: a right operand, or where kTurned a left one,
//                    [round_up(width, kWidth)][row / kPerCell]
//
// Behind what there is of cells along a sum, zeros stand up to a multiple of kDepth.
#pragma once
#include "rows.h"

namespace attn::cpu::ATTN_ISA {
namespace {

struct Operand {
  const Cell* data;
  int64_t stride;  // in cells
};

// Rows have one form, whichever side they are on.
constexpr bool kOneForm = kPerCell == 1;
// Sums for queries lie turned, [width][kQueries]: see sums.h.
constexpr bool kTurned = kDepth > 1;

ATTN_INLINE int64_t cells(int64_t n) { return (n + kPerCell - 1) / kPerCell; }
// The scale: numbers take it as they are packed, pairs would round, and there the products take it.
ATTN_INLINE Real query_scale(const Problem& p) { return kPerCell == 1 ? static_cast<Real>(p.scale) : 1; }
ATTN_INLINE Real product_scale(const Problem& p) { return kPerCell == 1 ? 1 : static_cast<Real>(p.scale); }
// Cells along a sum of n.
ATTN_INLINE int64_t depth_of(int64_t n) { return round_up(cells(n), kDepth); }
// Cells of packed columns of `width` numbers.
ATTN_INLINE int64_t packed_size(int64_t width) { return round_up(cells(width), kWidth) * kQueries; }

}  // namespace
}  // namespace attn::cpu::ATTN_ISA

#ifdef ATTN_PAIRS
#include "pairs.h"
#else
#include "numbers.h"
#endif
