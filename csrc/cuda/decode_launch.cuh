// The launches of one kind of decoding step; for inst/decode_*.cu.
#pragma once
#include "decode.cuh"
#include "decode_kernels.h"

namespace attn::cuda {

template <class T, int kDim, bool kManyRows>
const char* launch_decode(const DecodeCall& c, Stream stream) {
  using Kernel = DecodeKernel<T, kDim, kManyRows>;
  static_assert(Kernel::kRows == (kManyRows ? many_rows(std::is_same_v<T, float>, kDim) : kFewRows));
  const Decode& d = c.d;
  const char* said = launch<Kernel>(c, {d.B * d.Hkv * c.row_tiles * c.splits, 1, 1}, stream);
  if (*said != '\0' || c.splits == 1) return said;
  using Combine = DecodeCombine<T>;
  constexpr int kRows = Combine::kThreads / 32;
  return launch<Combine>(c, {(d.B * d.Hq * d.L + kRows - 1) / kRows, 1, 1}, stream);
}

}  // namespace attn::cuda
