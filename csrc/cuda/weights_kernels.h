// The kernels of the weights by what they are compiled for: weights.cu chooses one, inst/weights_*.cu hold
// them.
#pragma once
#include "dispatch.h"
#include "launch.h"

namespace attn::cuda {

template <class T, int kDim>
const char* launch_weights(const Call&, const Weights&, Stream);

}  // namespace attn::cuda
