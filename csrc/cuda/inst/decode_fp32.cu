#include "../decode_launch.cuh"

namespace attn::cuda {

template const char* launch_decode<float, 32, false>(const DecodeCall&, Stream);
template const char* launch_decode<float, 32, true>(const DecodeCall&, Stream);
template const char* launch_decode<float, 64, false>(const DecodeCall&, Stream);
template const char* launch_decode<float, 64, true>(const DecodeCall&, Stream);
template const char* launch_decode<float, 128, false>(const DecodeCall&, Stream);
template const char* launch_decode<float, 128, true>(const DecodeCall&, Stream);
template const char* launch_decode<float, 256, false>(const DecodeCall&, Stream);
template const char* launch_decode<float, 256, true>(const DecodeCall&, Stream);

}  // namespace attn::cuda
