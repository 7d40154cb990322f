// From what a call says at run time to the types and sizes that kernels are compiled for.
#pragma once
#include <type_traits>

#include "call.h"
#include "prim.cuh"

namespace attn::cuda {

template <class T>
struct Type {
  using type = T;
};

// visit(Type<T>) for the elements of a dtype.
template <class Visit>
const char* by_dtype(Dtype dtype, const Visit& visit) {
  if (dtype == Dtype::bf16) return visit(Type<prim::bf16>());
  if (dtype == Dtype::f16) return visit(Type<prim::fp16>());
  if (dtype == Dtype::f32) return visit(Type<float>());
  return "the CUDA kernels take float32, bfloat16 and float16";
}

// visit(std::integral_constant<int, N>) for the smallest of kDims that holds `dim`.
template <int kFirst, int... kOthers, class Visit>
const char* by_dim(int64_t dim, const Visit& visit) {
  if (dim <= kFirst) return visit(std::integral_constant<int, kFirst>());
  if constexpr (sizeof...(kOthers) > 0)
    return by_dim<kOthers...>(dim, visit);
  else
    return "the CUDA kernels take head_dim up to 256";
}

inline int64_t largest_dim(const Problem& p) { return p.D > p.Dv ? p.D : p.Dv; }

}  // namespace attn::cuda
