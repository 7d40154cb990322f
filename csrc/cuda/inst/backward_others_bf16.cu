#include "../backward_launch.cuh"

namespace attn::cuda {

template const char* launch_rows<bf16>(const BackwardRows<bf16>::Params&, Stream);
template const char* launch_delta<bf16>(const BackwardDelta<bf16>::Params&, Stream);
template const char* launch_bias<bf16>(const BackwardBias<bf16>::Params&, Stream);

}  // namespace attn::cuda
