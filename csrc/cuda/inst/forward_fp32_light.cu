#include "../forward_launch.cuh"

namespace attn::cuda {

template const char* launch_forward<float, 32, false>(const Call&, Stream);
template const char* launch_forward<float, 64, false>(const Call&, Stream);
template const char* launch_forward<float, 128, false>(const Call&, Stream);
template const char* launch_forward<float, 256, false>(const Call&, Stream);

}  // namespace attn::cuda
