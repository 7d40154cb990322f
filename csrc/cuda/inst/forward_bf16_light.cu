#include "../forward_launch.cuh"

namespace attn::cuda {

template const char* launch_forward<bf16, 32, false>(const Call&, Stream);
template const char* launch_forward<bf16, 64, false>(const Call&, Stream);
template const char* launch_forward<bf16, 128, false>(const Call&, Stream);
template const char* launch_forward<bf16, 256, false>(const Call&, Stream);

}  // namespace attn::cuda
