#include "../backward_launch.cuh"

namespace attn::cuda {

template const char* launch_rows<float>(const BackwardRows<float>::Params&, Stream);
template const char* launch_delta<float>(const BackwardDelta<float>::Params&, Stream);
template const char* launch_bias<float>(const BackwardBias<float>::Params&, Stream);

}  // namespace attn::cuda
