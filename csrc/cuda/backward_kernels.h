// The backward kernels by what they are compiled for: backward.cu chooses among them, inst/backward_*.cu hold
// them.
#pragma once
#include "backward_chunks.cuh"
#include "dispatch.h"
#include "launch.h"

namespace attn::cuda {

// dQ, dK and dV.
template <class T, int kDim, bool kHeavy>
const char* launch_backward(const Call&, const Backward&, const RowStatistics&, Stream);

// The other passes, each one kernel per dtype.
template <class T>
const char* launch_rows(const typename BackwardRows<T>::Params&, Stream);
template <class T>
const char* launch_delta(const typename BackwardDelta<T>::Params&, Stream);
template <class T>
const char* launch_bias(const typename BackwardBias<T>::Params&, Stream);

}  // namespace attn::cuda
