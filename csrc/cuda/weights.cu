// Chooses the kernel that makes the weights.
#include "weights_kernels.h"

namespace attn::cuda {

const char* weights(const Problem& p, const Weights& w, Stream stream) {
  if (p.L > kMostRows || p.S > kMostRows) return kTooMany;
  if (p.N > 0) return "the CUDA kernels make no weights of packed calls";
  const Call c = call_of(p);
  return by_dtype(p.dtype, [&](auto type) {
    return by_dim<32, 64, 128, 256>(p.D, [&](auto dim) {
      return launch_weights<typename decltype(type)::type, decltype(dim)::value>(c, w, stream);
    });
  });
}

}  // namespace attn::cuda
