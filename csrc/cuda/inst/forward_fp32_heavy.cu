#include "../forward_launch.cuh"

namespace attn::cuda {

template const char* launch_forward<float, 32, true>(const Call&, Stream);
template const char* launch_forward<float, 64, true>(const Call&, Stream);
template const char* launch_forward<float, 128, true>(const Call&, Stream);
template const char* launch_forward<float, 256, true>(const Call&, Stream);

}  // namespace attn::cuda
