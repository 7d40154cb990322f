#include "../forward_launch.cuh"

namespace attn::cuda {

template const char* launch_forward<fp16, 32, true>(const Call&, Stream);
template const char* launch_forward<fp16, 64, true>(const Call&, Stream);
template const char* launch_forward<fp16, 128, true>(const Call&, Stream);
template const char* launch_forward<fp16, 256, true>(const Call&, Stream);

}  // namespace attn::cuda
