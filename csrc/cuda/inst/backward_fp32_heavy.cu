#include "../backward_launch.cuh"

namespace attn::cuda {

template const char* launch_backward<float, 32, true>(const Call&, const Backward&, const RowStatistics&,
                                                      Stream);
template const char* launch_backward<float, 64, true>(const Call&, const Backward&, const RowStatistics&,
                                                      Stream);
template const char* launch_backward<float, 128, true>(const Call&, const Backward&, const RowStatistics&,
                                                       Stream);
template const char* launch_backward<float, 256, true>(const Call&, const Backward&, const RowStatistics&,
                                                       Stream);

}  // namespace attn::cuda
