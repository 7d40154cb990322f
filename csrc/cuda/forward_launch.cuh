// The launch of one forward kernel; for inst/forward_*.cu.
#pragma once
#include "forward.cuh"
#include "forward_kernels.h"

namespace attn::cuda {

template <class T, int kDim, bool kHeavy>
const char* launch_forward(const Call& c, Stream stream) {
  using Kernel = Forward<T, kDim, kHeavy>;
  return launch<Kernel>(c, {query_blocks<Kernel::kRows>(c.p), 1, 1}, stream);
}

}  // namespace attn::cuda
