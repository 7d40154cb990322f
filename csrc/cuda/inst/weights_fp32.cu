#include "../weights_launch.cuh"

namespace attn::cuda {

template const char* launch_weights<float, 32>(const Call&, const Weights&, Stream);
template const char* launch_weights<float, 64>(const Call&, const Weights&, Stream);
template const char* launch_weights<float, 128>(const Call&, const Weights&, Stream);
template const char* launch_weights<float, 256>(const Call&, const Weights&, Stream);

}  // namespace attn::cuda
