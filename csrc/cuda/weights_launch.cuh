// The launch of one kernel of the weights; for inst/weights_*.cu.
#pragma once
#include "weights.cuh"
#include "weights_kernels.h"

namespace attn::cuda {

template <class T, int kDim>
const char* launch_weights(const Call& c, const Weights& w, Stream stream) {
  using Kernel = WeightsKernel<T, kDim>;
  const typename Kernel::Params params{c, w, access_of({w.data, 0, 0, c.p.S}, c.p.dtype)};
  return launch<Kernel>(params, {Kernel::blocks(params), 1, 1}, stream);
}

}  // namespace attn::cuda
