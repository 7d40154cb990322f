#include "../backward_launch.cuh"

namespace attn::cuda {

template const char* launch_rows<fp16>(const BackwardRows<fp16>::Params&, Stream);
template const char* launch_delta<fp16>(const BackwardDelta<fp16>::Params&, Stream);
template const char* launch_bias<fp16>(const BackwardBias<fp16>::Params&, Stream);

}  // namespace attn::cuda
