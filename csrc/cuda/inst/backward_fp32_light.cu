#include "../backward_launch.cuh"

namespace attn::cuda {

template const char* launch_backward<float, 32, false>(const Call&, const Backward&, const RowStatistics&,
                                                       Stream);
template const char* launch_backward<float, 64, false>(const Call&, const Backward&, const RowStatistics&,
                                                       Stream);
template const char* launch_backward<float, 128, false>(const Call&, const Backward&, const RowStatistics&,
                                                        Stream);
template const char* launch_backward<float, 256, false>(const Call&, const Backward&, const RowStatistics&,
                                                        Stream);

}  // namespace attn::cuda
