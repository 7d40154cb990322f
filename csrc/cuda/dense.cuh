// The dense parts of a call, bias and mask, on their way to the scores: a warp reads those of its part of a
// tile from global memory, whatever their dtype and strides, and leaves float32 in its own piece of shared
// memory.
#pragma once
#include "tile.cuh"

namespace attn::cuda {

// Stands where the mask hides: a NaN whose bits no staged number has.
constexpr uint32_t kHidden = 0xffffffffu;

template <int kRowCount, int kColCount>
struct Staged {
  static constexpr int kRows = kRowCount, kCols = kColCount;
  static constexpr int kRowBytes = (kCols + 8) * 4;  // eight rows of one column lie in different banks
  static constexpr int kBytes = kRows * kRowBytes;

  ATTN_DEV static uint32_t at(uint32_t base, int row, int col) {
    return base + static_cast<uint32_t>(row * kRowBytes + col * 4);
  }
};

// One head's plane of a dense operand.
struct Plane {
  const char* data;  // null where there is none
  int64_t row, col;  // strides in elements
  Dtype dtype;

  ATTN_DEV Plane(const Dense& d, const Sequence& s, int head, int size)
      : row(d.row), col(d.col), dtype(d.dtype) {
    data = static_cast<const char*>(d.data);
    if (data) data += size * (s.batch * d.batch + head * d.head);
  }
  ATTN_DEV Plane transposed() const {
    Plane t = *this;
    t.row = col;
    t.col = row;
    return t;
  }
  template <class T>
  ATTN_DEV T read(int i, int j) const {
    return ldg(reinterpret_cast<const T*>(data) + i * row + j * col);
  }
};
ATTN_DEV int size_of(Dtype d) { return d == Dtype::f64 ? 8 : d == Dtype::f32 ? 4 : 2; }

struct Nothing {};
ATTN_DEV float number(float x) { return x; }
ATTN_DEV float number(double x) { return static_cast<float>(x); }
ATTN_DEV float number(bf16 x) { return to_float(x); }
ATTN_DEV float number(fp16 x) { return to_float(x); }

// Rows [q0, q0 + kRows) and keys [k0, k0 + kCols) that are before the ends; the others are 0.
template <class Piece, class T>
ATTN_DEV void stage(uint32_t to, const Plane& bias, const Plane& keep, int q0, int q_end, int k0, int k_end) {
  ATTN_NO_UNROLL
  for (int x = static_cast<int>(lane()); x < Piece::kRows * Piece::kCols; x += 32) {
    const int row = x / Piece::kCols, col = x % Piece::kCols, i = q0 + row, j = k0 + col;
    uint32_t bits = 0;
    if (i < q_end && j < k_end) {
      if constexpr (!std::is_same_v<T, Nothing>) {
        const float b = number(bias.read<T>(i, j));
        bits = b == b ? bit_cast<uint32_t>(b) : 0x7fc00000u;
      }
      if (keep.data && !keep.read<uint8_t>(i, j)) bits = kHidden;
    }
    sts(Piece::at(to, row, col), bits);
  }
}

// The bias and the mask of one head.
struct DensePart {
  Plane bias, keep;

  ATTN_DEV DensePart(const Problem& p, const Sequence& s, int head)
      : bias(p.bias, s, head, size_of(p.bias.dtype)), keep(p.keep, s, head, 1) {}

  ATTN_DEV DensePart(const Plane& bias_, const Plane& keep_) : bias(bias_), keep(keep_) {}

  ATTN_DEV bool any() const { return bias.data || keep.data; }
  ATTN_DEV DensePart transposed() const { return {bias.transposed(), keep.transposed()}; }

  // By one warp, between barriers of it.
  template <class Piece>
  ATTN_DEV void stage_piece(uint32_t to, int q0, int q_end, int k0, int k_end) const {
    if (!bias.data) return stage<Piece, Nothing>(to, bias, keep, q0, q_end, k0, k_end);
    if (bias.dtype == Dtype::f32) return stage<Piece, float>(to, bias, keep, q0, q_end, k0, k_end);
    if (bias.dtype == Dtype::bf16) return stage<Piece, bf16>(to, bias, keep, q0, q_end, k0, k_end);
    if (bias.dtype == Dtype::f16) return stage<Piece, fp16>(to, bias, keep, q0, q_end, k0, k_end);
    return stage<Piece, double>(to, bias, keep, q0, q_end, k0, k_end);
  }
};

}  // namespace attn::cuda
