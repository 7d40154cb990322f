#include "../backward_launch.cuh"

namespace attn::cuda {

template const char* launch_backward<fp16, 32, false>(const Call&, const Backward&, const RowStatistics&,
                                                      Stream);
template const char* launch_backward<fp16, 64, false>(const Call&, const Backward&, const RowStatistics&,
                                                      Stream);
template const char* launch_backward<fp16, 128, false>(const Call&, const Backward&, const RowStatistics&,
                                                       Stream);
template const char* launch_backward<fp16, 256, false>(const Call&, const Backward&, const RowStatistics&,
                                                       Stream);

}  // namespace attn::cuda
