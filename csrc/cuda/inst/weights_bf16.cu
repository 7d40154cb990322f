#include "../weights_launch.cuh"

namespace attn::cuda {

template const char* launch_weights<bf16, 32>(const Call&, const Weights&, Stream);
template const char* launch_weights<bf16, 64>(const Call&, const Weights&, Stream);
template const char* launch_weights<bf16, 128>(const Call&, const Weights&, Stream);
template const char* launch_weights<bf16, 256>(const Call&, const Weights&, Stream);

}  // namespace attn::cuda
