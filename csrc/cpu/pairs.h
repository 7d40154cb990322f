// Operands whose cells are pairs of bf16; see operands.h. What would stand beside the last number of an odd
// count is 0.
#pragma once
#include "operands.h"

namespace attn::cpu::ATTN_ISA {
namespace {

// The pairs of a row, `n` numbers of which are left from `from` on; 0 behind them.
ATTN_INLINE Cells pairs_along(const Bf16* from, int64_t n) {
  if (n >= 2 * kWidth) return load_cells(from);
  Bf16 line[2 * kWidth] = {};
  for (int64_t i = 0; i < n; ++i) line[i] = from[i];
  return load_cells(line);
}
// Pairs of the same place in two rows; `second` null: with 0.
ATTN_INLINE Cells pairs_across(const Bf16* first, const Bf16* second, int64_t n) {
  if (n >= kWidth && second) return interleave(first, second);
  Bf16 lines[2][kWidth] = {};
  for (int64_t i = 0; i < least<int64_t>(n, kWidth); ++i) {
    lines[0][i] = first[i];
    if (second) lines[1][i] = second[i];
  }
  return interleave(lines[0], lines[1]);
}

// Numbers cannot be scaled on the way: `factor` must be 1.
ATTN_INLINE void pack_columns(const Bf16* from, int64_t stride, int64_t rows, int64_t width, Real, Cell* to) {
  for (int64_t r = 0; r < rows; r += kWidth)
    for (int64_t d = 0; d < cells(width); d += kWidth) {
      Vec t[kWidth];
      const int64_t have = rows - r;
      for (int i = 0; i < kWidth; ++i)
        t[i] = i < have ? as_numbers(pairs_along(from + (r + i) * stride + 2 * d, width - 2 * d)) : zero();
      transpose(t);  // moves 32 bits whatever they mean
      ATTN_UNROLL
      for (int i = 0; i < kWidth; ++i) store_cells(to + (d + i) * kQueries + r, as_cells(t[i]));
    }
}

ATTN_INLINE void clear_cells(Cell* at, int64_t n) { memset(at, 0, static_cast<size_t>(n) * sizeof(Cell)); }

template <class T>
ATTN_INLINE bool is_near(int64_t, int64_t) {
  return false;
}
ATTN_INLINE Operand right_operand(const Bf16* from, int64_t stride, int64_t rows, int64_t width,
                                  Cell* space) {
  const int64_t wide = round_up(width, kWidth);
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t d = 0; d < width; d += kWidth) {
      const Bf16* first = from + r * stride + d;
      store_cells(space + r / 2 * wide + d,
                  pairs_across(first, r + 1 < rows ? first + stride : nullptr, width - d));
    }
  clear_cells(space + cells(rows) * wide, (depth_of(rows) - cells(rows)) * wide);
  return {space, wide};
}
// In place for even widths (whole depths) and strides, else copied into `space` of rows *
// round_up(cells(width), kWidth).
ATTN_INLINE Operand left_operand(const Bf16* from, int64_t stride, int64_t rows, int64_t width, Cell* space) {
  if (width % (2 * kDepth) == 0 && stride % 2 == 0) return {reinterpret_cast<const Cell*>(from), stride / 2};
  const int64_t wide = round_up(cells(width), kWidth);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < cells(width); d += kWidth)
      store_cells(space + r * wide + d, pairs_along(from + r * stride + 2 * d, width - 2 * d));
  return {space, wide};
}

// The rows turned, in strips of kDepth pairs of them.
ATTN_INLINE Operand turned_operand(const Bf16* from, int64_t stride, int64_t rows, int64_t width,
                                   Cell* space) {
  const int64_t depth = depth_of(rows);
  for (int64_t r = 0; r < depth; r += kWidth)
    for (int64_t d = 0; d < width; d += kWidth) {
      Vec t[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const int64_t row = 2 * (r + i);
        const Bf16* first = from + row * stride + d;
        t[i] = row >= rows
                   ? zero()
                   : as_numbers(pairs_across(first, row + 1 < rows ? first + stride : nullptr, width - d));
      }
      transpose(t);
      ATTN_UNROLL
      for (int i = 0; i < kWidth; ++i) store_cells(space + (d + i) * depth + r, as_cells(t[i]));
    }
  return {space, depth};
}
ATTN_INLINE Operand key_operand(const Bf16* from, int64_t stride, int64_t rows, int64_t width, Cell* space) {
  if constexpr (kTurned) return turned_operand(from, stride, rows, width, space);
  return right_operand(from, stride, rows, width, space);
}

// Round a tile, into room for depth_of(nk) rows of kQueries. A NaN among exponentials is in their sum,
// whatever becomes of it here.
ATTN_INLINE void store_columns(const Vec* exponentials, int n, Cell* to) {
  for (int i = 0; i < n; i += 2)
    store_cells(to + i / 2 * kQueries,
                pair_exponentials(exponentials[i], i + 1 < n ? exponentials[i + 1] : zero()));
}
ATTN_INLINE void end_columns(int64_t nk, Cell* to) {
  clear_cells(to + cells(nk) * kQueries, (depth_of(nk) - cells(nk)) * kQueries);
}
ATTN_NOINLINE const Cell* columns_of(const Real* tile, int64_t nq, int64_t nk, Cell* space) {
  for (int64_t j = 0; j < nk; j += 2)
    for (int64_t c = 0; c < nq; c += kWidth) {
      const Real* at = tile + j * kQueries + c;
      const Vec second = j + 1 < nk ? load(at + kQueries) : zero();
      store_cells(space + j / 2 * kQueries + c, pair_lanes(load(at), second));
    }
  end_columns(nk, space);
  return space;
}
// Room for nk rows of kQueries / 2; queries from nq on are 0.
ATTN_NOINLINE const Cell* rows_of(const Real* tile, int64_t nq, int64_t nk, Cell* space) {
  for (int64_t j = 0; j < nk; ++j)
    for (int64_t c = 0; c < nq; c += 2 * kWidth) {
      const Real* at = tile + j * kQueries + c;
      Vec x = load(at), y = c + kWidth < nq ? load(at + kWidth) : zero();
      if (c + 2 * kWidth > nq) {
        const uint64_t on = (uint64_t{1} << (nq - c)) - 1;
        x = select(lanes_of(on), x, zero());
        y = select(lanes_of(on >> kWidth), y, zero());
      }
      store_cells(space + j * (kQueries / 2) + c / 2, pair_neighbours(x, y));
    }
  return space;
}

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
