#include "../decode_launch.cuh"

namespace attn::cuda {

template const char* launch_decode<bf16, 32, false>(const DecodeCall&, Stream);
template const char* launch_decode<bf16, 32, true>(const DecodeCall&, Stream);
template const char* launch_decode<bf16, 64, false>(const DecodeCall&, Stream);
template const char* launch_decode<bf16, 64, true>(const DecodeCall&, Stream);
template const char* launch_decode<bf16, 128, false>(const DecodeCall&, Stream);
template const char* launch_decode<bf16, 128, true>(const DecodeCall&, Stream);
template const char* launch_decode<bf16, 256, false>(const DecodeCall&, Stream);
template const char* launch_decode<bf16, 256, true>(const DecodeCall&, Stream);

}  // namespace attn::cuda
