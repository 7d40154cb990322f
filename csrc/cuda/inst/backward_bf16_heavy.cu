#include "../backward_launch.cuh"

namespace attn::cuda {

template const char* launch_backward<bf16, 32, true>(const Call&, const Backward&, const RowStatistics&,
                                                     Stream);
template const char* launch_backward<bf16, 64, true>(const Call&, const Backward&, const RowStatistics&,
                                                     Stream);
template const char* launch_backward<bf16, 128, true>(const Call&, const Backward&, const RowStatistics&,
                                                      Stream);
template const char* launch_backward<bf16, 256, true>(const Call&, const Backward&, const RowStatistics&,
                                                      Stream);

}  // namespace attn::cuda
