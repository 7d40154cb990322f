// The kernels of decoding by what they are compiled for: decode.cu chooses, inst/decode_*.cu hold them.
#pragma once
#include "decode_plan.h"
#include "dispatch.h"
#include "launch.h"

namespace attn::cuda {

template <class T, int kDim, bool kManyRows>
const char* launch_decode(const DecodeCall&, Stream);

// Rows of a tile of queries. Few rows: the warps of a block divide the keys instead.
constexpr int kFewRows = 16;
constexpr int many_rows(bool is_float, int dim) { return is_float && dim > 128 ? 32 : 64; }

}  // namespace attn::cuda
