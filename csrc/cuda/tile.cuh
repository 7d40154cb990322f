// Tiles in shared memory: how they come from global memory and go back, and the two products of attention.
//
// A tile is rows of kDim elements in chunks of 16 bytes, whose places within a row are exchanged ("swizzled")
// so that the eight rows which an ldmatrix reads lie in different banks. Elements past the width of a tensor,
// and rows past its end, are 0. A tile begins at a multiple of 128 bytes.
//
// An accumulator is float[kM][kN][4] per thread of a warp: kM times 16 rows by kN times 8 columns, as the
// tensor core lays them out. `row_of` and `col_of` say which element is which.
#pragma once
#include <type_traits>

#include "mask.cuh"

namespace attn::cuda {

template <class T, int kRowCount, int kDimCount>
struct Tile {
  using Element = T;
  static constexpr int kRows = kRowCount, kDim = kDimCount;
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(T)), kChunks = kRowBytes / 16;
  static constexpr int kBytes = kRows * kRowBytes, kPerChunk = 16 / static_cast<int>(sizeof(T));
  static_assert(kChunks % 4 == 0, "a row is made of 64 bytes");

  // The address of a chunk. Rows of an odd number of 64 bytes: two of them differ by half a line of banks.
  ATTN_DEV static uint32_t at(uint32_t base, int row, int chunk) {
    const int swizzled = kChunks % 8 == 0 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3);
    return base + static_cast<uint32_t>(row * kRowBytes + swizzled * 16);
  }
  // From the address of one of the first two chunks of a row to that of the chunk `chunks`, an even number,
  // on: by exchanging bits, which costs no register that lasts.
  ATTN_DEV static uint32_t on(uint32_t start, int chunks) {
    constexpr int kGroup = kChunks % 8 == 0 ? 8 : 4;
    return (start ^ static_cast<uint32_t>(chunks % kGroup * 16)) +
           static_cast<uint32_t>(chunks / kGroup * kGroup * 16);
  }
};

// Rows of a tensor in global memory.
struct GlobalRows {
  const char* base;
  int64_t stride;  // bytes

  ATTN_DEV const char* row(int i) const { return base + i * stride; }

  struct Cursor {
    const char* at;
    int64_t step;
    ATTN_DEV const char* here() const { return at; }
    ATTN_DEV void next() { at += step; }
  };
  // Walks over every step-th row from `first` on.
  ATTN_DEV Cursor cursor(int first, int step) const { return {row(first), step * stride}; }
};

// The cursor of rows whose places follow no rule.
template <class Source>
struct IndexCursor {
  const Source& from;
  int index, step;
  ATTN_DEV const char* here() const { return from.row(index); }
  ATTN_DEV void next() { index += step; }
};

template <class T>
ATTN_DEV GlobalRows global_rows(const Rows& r, int64_t batch, int64_t head, int64_t first) {
  const int64_t size = sizeof(T);
  return {static_cast<const char*>(r.data) + size * (batch * r.batch + head * r.head + first * r.row),
          size * r.row};
}

// One chunk by copies narrower than itself. `valid` bytes of it are in the tensor.
ATTN_DEV void copy_chunk(uint32_t to, const char* from, int valid, int access) {
  for (int at = 0; at < 16; at += access) {
    const int bytes = clamp(valid - at, 0, access);
    const char* source = bytes > 0 ? from + at : from;
    if (access == 8) {
      cp_async_8(to + at, source, bytes);
    } else if (access == 4) {
      cp_async_4(to + at, source, bytes);
    } else {
      sts<uint16_t>(to + at, bytes > 0 ? ldg(reinterpret_cast<const uint16_t*>(source)) : uint16_t(0));
    }
  }
}

// Starts the copy of kRows rows from `first` on, those from `end` on as 0; all kThreads threads take part.
// `width` is that of the tensor in bytes, `access` that of its copies. Closes no group.
template <class Tile, int kThreads, class Source>
ATTN_DEV void copy_tile(uint32_t to, const Source& from, int first, int end, int width, int access) {
  constexpr int kAll = Tile::kRows * Tile::kChunks, kStep = kThreads / Tile::kChunks;
  const int thread = static_cast<int>(tid());
  if (access == 16) {
    if constexpr (kThreads % Tile::kChunks == 0) {  // a thread has one column of chunks
      const int row = thread / Tile::kChunks, chunk = thread % Tile::kChunks;
      const int in_row = clamp(width - chunk * 16, 0, 16);
      auto at = from.cursor(first + row, kStep);
      ATTN_UNROLL
      for (int i = 0; i < Tile::kRows; i += kStep) {
        if (Tile::kRows % kStep != 0 && row + i >= Tile::kRows) break;
        const int valid = first + row + i < end ? in_row : 0;
        cp_async_16(Tile::at(to, row + i, chunk), valid > 0 ? at.here() + chunk * 16 : from.base, valid);
        at.next();
      }
    } else {
      ATTN_UNROLL
      for (int i = 0; i < (kAll + kThreads - 1) / kThreads; ++i) {
        const int x = thread + i * kThreads, row = x / Tile::kChunks, chunk = x % Tile::kChunks;
        if (kAll % kThreads != 0 && x >= kAll) break;
        const int valid = first + row < end ? clamp(width - chunk * 16, 0, 16) : 0;
        cp_async_16(Tile::at(to, row, chunk), valid > 0 ? from.row(first + row) + chunk * 16 : from.base,
                    valid);
      }
    }
    return;
  }
  ATTN_NO_UNROLL for (int x = thread; x < kAll; x += kThreads) {
    const int row = x / Tile::kChunks, chunk = x % Tile::kChunks;
    const int valid = first + row < end ? clamp(width - chunk * 16, 0, 16) : 0;
    copy_chunk(Tile::at(to, row, chunk), valid > 0 ? from.row(first + row) + chunk * 16 : from.base, valid,
               access);
  }
}

// The row and the column, within an accumulator, of its element [m][n][e] in this lane.
ATTN_DEV int row_of(int m, int e) { return m * 16 + static_cast<int>(lane() >> 2) + (e >> 1) * 8; }
ATTN_DEV int col_of(int n, int e) { return n * 8 + static_cast<int>(lane() & 3) * 2 + (e & 1); }

template <int kM, int kN>
ATTN_DEV void clear(float (&acc)[kM][kN][4]) {
  ATTN_UNROLL for (int m = 0; m < kM; ++m) ATTN_UNROLL for (int n = 0; n < kN; ++n)
      ATTN_UNROLL for (int e = 0; e < 4; ++e) acc[m][n][e] = 0.f;
}

// A left operand of 16 rows by 32 bytes of depth as the tensor core takes it, and the products with a right
// one of 8 columns (b0, b1). float: three products of numbers of 11 bits each, which leave out low by low
// alone.
template <class T>
struct Left {
  uint32_t a[4];

  ATTN_DEV void set(const uint32_t (&raw)[4]) { ATTN_UNROLL for (int i = 0; i < 4; ++i) a[i] = raw[i]; }
  ATTN_DEV void multiply(float (&acc)[4], uint32_t b0, uint32_t b1) const { mma_m16n8k16<T>(acc, a, b0, b1); }
};

struct Split {
  uint32_t high, low;

  ATTN_DEV explicit Split(uint32_t raw) {
    const float x = bit_cast<float>(raw);
    high = to_tf32(x);
    low = to_tf32(x - bit_cast<float>(high));
  }
};

template <>
struct Left<float> {
  uint32_t high[4], low[4];

  ATTN_DEV void set(const uint32_t (&raw)[4]) {
    ATTN_UNROLL for (int i = 0; i < 4; ++i) {
      const Split s(raw[i]);
      high[i] = s.high;
      low[i] = s.low;
    }
  }
  ATTN_DEV void multiply(float (&acc)[4], const Split& b0, const Split& b1) const {
    mma_m16n8k8_tf32(acc, low, b0.high, b1.high);
    mma_m16n8k8_tf32(acc, high, b0.low, b1.low);
    mma_m16n8k8_tf32(acc, high, b0.high, b1.high);
  }
};

// What `multiply` takes of a raw right operand.
template <class T>
using Right = std::conditional_t<std::is_same_v<T, float>, Split, uint32_t>;

// acc[i][j] += a[a_row + i] . b[b_row + j] for kM * 16 rows of a and kN * 8 rows of b.
template <class TileA, class TileB, int kM, int kN>
ATTN_DEV void multiply_rows(float (&acc)[kM][kN][4], uint32_t a, int a_row, uint32_t b, int b_row) {
  using T = typename TileA::Element;
  static_assert(kN % 2 == 0 && TileA::kChunks == TileB::kChunks);
  static_assert(!std::is_same_v<T, float> || TileA::kChunks % 8 == 0);
  const int x = static_cast<int>(lane() & 7), which = static_cast<int>(lane() >> 3);
  uint32_t from_a = TileA::at(a, a_row + (which & 1) * 8 + x, which >> 1);
  uint32_t from_b = TileB::at(b, b_row + (which >> 1) * 8 + x, which & 1);
  // The splitting of float32 fills the pipes by itself: unrolled further, it fills the registers.
  constexpr int kAtOnce = std::is_same_v<T, float> ? 8 : TileA::kChunks;
  ATTN_NO_UNROLL
  for (int first = 0; first < TileA::kChunks;
       first += kAtOnce, from_a += kAtOnce * 16, from_b += kAtOnce * 16)
    ATTN_UNROLL for (int k = 0; k < kAtOnce; k += 2) {
      uint32_t raw[4];
      Left<T> left[kM];
      ATTN_UNROLL for (int m = 0; m < kM; ++m) {
        ldmatrix_x4(raw, TileA::on(from_a, k) + static_cast<uint32_t>(m * 16 * TileA::kRowBytes));
        left[m].set(raw);
      }
      ATTN_UNROLL for (int n = 0; n < kN; n += 2) {
        ldmatrix_x4(raw, TileB::on(from_b, k) + static_cast<uint32_t>(n * 8 * TileB::kRowBytes));
        const Right<T> b0(raw[0]), b1(raw[1]), b2(raw[2]), b3(raw[3]);
        ATTN_UNROLL for (int m = 0; m < kM; ++m) {
          left[m].multiply(acc[m][n], b0, b1);
          left[m].multiply(acc[m][n + 1], b2, b3);
        }
      }
    }
}

// acc[i][d] += sum over j of p[i][j] b[b_row + j][d]: p is an accumulator of kN * 8 columns, d goes over the
// columns of the tile.
template <class TileB, int kM, int kN, int kD>
ATTN_DEV void multiply_columns(float (&acc)[kM][kD][4], const float (&p)[kM][kN][4], uint32_t b, int b_row) {
  using T = typename TileB::Element;
  if constexpr (std::is_same_v<T, float>) {
    // Key 2t stands for column t of the left operand, key 2t + 1 for column t + 4: so p is in place.
    const int t = static_cast<int>(lane() & 3), g = static_cast<int>(lane() >> 2);
    const uint32_t in_chunk = static_cast<uint32_t>(g % 4) * 4;
    const uint32_t even = TileB::at(b, b_row + 2 * t, g / 4) + in_chunk;
    const uint32_t odd = TileB::at(b, b_row + 2 * t + 1, g / 4) + in_chunk;
    ATTN_UNROLL for (int n = 0; n < kN; ++n) {
      Left<T> left[kM];
      ATTN_UNROLL for (int m = 0; m < kM; ++m) {
        const uint32_t raw[4] = {bit_cast<uint32_t>(p[m][n][0]), bit_cast<uint32_t>(p[m][n][2]),
                                 bit_cast<uint32_t>(p[m][n][1]), bit_cast<uint32_t>(p[m][n][3])};
        left[m].set(raw);
      }
      ATTN_UNROLL for (int d = 0; d < kD; ++d) {
        const uint32_t down = static_cast<uint32_t>(n * 8 * TileB::kRowBytes);
        const Split b0(lds<uint32_t>(TileB::on(even, 2 * d) + down)),
            b1(lds<uint32_t>(TileB::on(odd, 2 * d) + down));
        ATTN_UNROLL for (int m = 0; m < kM; ++m) left[m].multiply(acc[m][d], b0, b1);
      }
    }
  } else {
    static_assert(kN % 2 == 0 && kD % 2 == 0);
    const int x = static_cast<int>(lane() & 7), which = static_cast<int>(lane() >> 3);
    const uint32_t from_b = TileB::at(b, b_row + (which & 1) * 8 + x, which >> 1);
    ATTN_UNROLL for (int n = 0; n < kN; n += 2) {
      Left<T> left[kM];
      ATTN_UNROLL for (int m = 0; m < kM; ++m) {
        const uint32_t raw[4] = {pack2<T>(p[m][n][0], p[m][n][1]), pack2<T>(p[m][n][2], p[m][n][3]),
                                 pack2<T>(p[m][n + 1][0], p[m][n + 1][1]),
                                 pack2<T>(p[m][n + 1][2], p[m][n + 1][3])};
        left[m].set(raw);
      }
      ATTN_UNROLL for (int d = 0; d < kD; d += 2) {
        uint32_t raw[4];
        ldmatrix_x4_trans(raw, TileB::on(from_b, d) + static_cast<uint32_t>(n * 8 * TileB::kRowBytes));
        ATTN_UNROLL for (int m = 0; m < kM; ++m) {
          left[m].multiply(acc[m][d], raw[0], raw[1]);
          left[m].multiply(acc[m][d + 1], raw[2], raw[3]);
        }
      }
    }
  }
}

// A warp's own rows [row, row + kM * 16) of a tile := acc * factor[m][half of the 16 rows]; a factor of 0
// makes 0 of NaN too.
template <class Tile, int kM, int kD>
ATTN_DEV void put_rows(uint32_t to, int row, const float (&acc)[kM][kD][4], const float (&factor)[kM][2]) {
  using T = typename Tile::Element;
  ATTN_UNROLL for (int m = 0; m < kM; ++m) ATTN_UNROLL for (int half = 0; half < 2; ++half) {
    const float f = factor[m][half];
    ATTN_UNROLL for (int d = 0; d < kD; ++d) {
      const float x = f == 0.f ? 0.f : acc[m][d][2 * half] * f,
                  y = f == 0.f ? 0.f : acc[m][d][2 * half + 1] * f;
      const int col = col_of(d, 0);
      const uint32_t at = Tile::at(to, row + row_of(m, 2 * half), col / Tile::kPerChunk) +
                          static_cast<uint32_t>(col % Tile::kPerChunk * static_cast<int>(sizeof(T)));
      if constexpr (std::is_same_v<T, float>)
        sts(at, u32x2{bit_cast<uint32_t>(x), bit_cast<uint32_t>(y)});
      else
        sts(at, pack2<T>(x, y));
    }
  }
}

template <class Piece>
ATTN_DEV void store_pieces(char* to, uint32_t from, int valid) {
  for (int at = 0; at < valid; at += static_cast<int>(sizeof(Piece)))
    stg(reinterpret_cast<Piece*>(to + at), lds<Piece>(from + static_cast<uint32_t>(at)));
}

// Rows [row, row + n) of a tile to global memory by one warp, as far as they are before `end`; `first` is
// where row 0 of the tile belongs.
template <class Tile>
ATTN_DEV void store_rows(uint32_t from, int row, int n, const GlobalRows& to, int first, int end, int width,
                         int access) {
  ATTN_NO_UNROLL for (int x = static_cast<int>(lane()); x < n * Tile::kChunks; x += 32) {
    const int r = row + x / Tile::kChunks, chunk = x % Tile::kChunks, valid = least(width - chunk * 16, 16);
    if (first + r >= end || valid <= 0) continue;
    char* at = const_cast<char*>(to.row(first + r)) + chunk * 16;
    const uint32_t source = Tile::at(from, r, chunk);
    if (access == 16 && valid == 16)
      stg(reinterpret_cast<u32x4*>(at), lds<u32x4>(source));
    else if (access >= 8 && valid % 8 == 0)
      store_pieces<u32x2>(at, source, valid);
    else if (access >= 4 && valid % 4 == 0)
      store_pieces<uint32_t>(at, source, valid);
    else
      store_pieces<uint16_t>(at, source, valid);
  }
}

}  // namespace attn::cuda
