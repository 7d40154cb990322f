#include "../forward_launch.cuh"

namespace attn::cuda {

template const char* launch_forward<bf16, 32, true>(const Call&, Stream);
template const char* launch_forward<bf16, 64, true>(const Call&, Stream);
template const char* launch_forward<bf16, 128, true>(const Call&, Stream);
template const char* launch_forward<bf16, 256, true>(const Call&, Stream);

}  // namespace attn::cuda
