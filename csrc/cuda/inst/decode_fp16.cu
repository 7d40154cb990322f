#include "../decode_launch.cuh"

namespace attn::cuda {

template const char* launch_decode<fp16, 32, false>(const DecodeCall&, Stream);
template const char* launch_decode<fp16, 32, true>(const DecodeCall&, Stream);
template const char* launch_decode<fp16, 64, false>(const DecodeCall&, Stream);
template const char* launch_decode<fp16, 64, true>(const DecodeCall&, Stream);
template const char* launch_decode<fp16, 128, false>(const DecodeCall&, Stream);
template const char* launch_decode<fp16, 128, true>(const DecodeCall&, Stream);
template const char* launch_decode<fp16, 256, false>(const DecodeCall&, Stream);
template const char* launch_decode<fp16, 256, true>(const DecodeCall&, Stream);

}  // namespace attn::cuda
