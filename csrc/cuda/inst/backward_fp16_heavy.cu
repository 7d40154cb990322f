#include "../backward_launch.cuh"

namespace attn::cuda {

template const char* launch_backward<fp16, 32, true>(const Call&, const Backward&, const RowStatistics&,
                                                     Stream);
template const char* launch_backward<fp16, 64, true>(const Call&, const Backward&, const RowStatistics&,
                                                     Stream);
template const char* launch_backward<fp16, 128, true>(const Call&, const Backward&, const RowStatistics&,
                                                      Stream);
template const char* launch_backward<fp16, 256, true>(const Call&, const Backward&, const RowStatistics&,
                                                      Stream);

}  // namespace attn::cuda
