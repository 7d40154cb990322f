// The forward kernels by what they are compiled for: forward.cu chooses one, inst/forward_*.cu hold them.
#pragma once
#include "dispatch.h"
#include "launch.h"

namespace attn::cuda {

template <class T, int kDim, bool kHeavy>
const char* launch_forward(const Call&, Stream);

}  // namespace attn::cuda
