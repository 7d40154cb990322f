// Chooses the kernel of a forward pass.
#include "forward_kernels.h"

namespace attn::cuda {

const char* forward(const Problem& p, Stream stream) {
  if (p.L > kMostRows || p.S > kMostRows) return kTooMany;
  const Call c = call_of(p);
  return by_dtype(p.dtype, [&](auto type) {
    return by_dim<32, 64, 128, 256>(largest_dim(p), [&](auto dim) {
      using T = typename decltype(type)::type;
      constexpr int kDim = decltype(dim)::value;
      return is_light(p) ? launch_forward<T, kDim, false>(c, stream)
                         : launch_forward<T, kDim, true>(c, stream);
    });
  });
}

}  // namespace attn::cuda
