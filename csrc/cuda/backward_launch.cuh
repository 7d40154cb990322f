// The launches of the backward kernels; for inst/backward_*.cu.
#pragma once
#include "backward.cuh"
#include "backward_kernels.h"

namespace attn::cuda {

template <class T, int kDim, bool kHeavy, Part kPart>
const char* launch_part(const Call& c, const Backward& b, const RowStatistics& rows, Stream stream) {
  using Kernel = BackwardPass<T, kDim, kHeavy, kPart>;
  const int64_t blocks = Kernel::kOfKeys ? key_blocks<Kernel::kOwn>(c.p) : query_blocks<Kernel::kOwn>(c.p);
  return launch<Kernel>({c, b, rows}, {blocks, 1, 1}, stream);
}

template <class T, int kDim, bool kHeavy>
const char* launch_backward(const Call& c, const Backward& b, const RowStatistics& rows, Stream stream) {
  const char* said = launch_part<T, kDim, kHeavy, Part::kQueries>(c, b, rows, stream);
  if (*said) return said;
  if constexpr (kDim > 128) {
    said = launch_part<T, kDim, kHeavy, Part::kKeys>(c, b, rows, stream);
    return *said ? said : launch_part<T, kDim, kHeavy, Part::kValues>(c, b, rows, stream);
  } else {
    return launch_part<T, kDim, kHeavy, Part::kKeysAndValues>(c, b, rows, stream);
  }
}

template <class T>
const char* launch_rows(const typename BackwardRows<T>::Params& x, Stream stream) {
  return launch<BackwardRows<T>>(x, {query_blocks<kRowPad>(x.c.p), 1, 1}, stream);
}
template <class T>
const char* launch_delta(const typename BackwardDelta<T>::Params& x, Stream stream) {
  return launch<BackwardDelta<T>>(x, {query_blocks<ChunkedTile<T>::kRows>(x.c.p), 1, 1}, stream);
}
template <class T>
const char* launch_bias(const typename BackwardBias<T>::Params& x, Stream stream) {
  return launch<BackwardBias<T>>(x, {x.blocks(), 1, 1}, stream);
}

}  // namespace attn::cuda
