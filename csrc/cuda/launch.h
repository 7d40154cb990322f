// The one header between the binding and the CUDA kernels: neither torch nor CUDA is in it.
//
// Every pointer of a call points to memory of the device whose stream is given; what was read off the
// tensors' shapes is right, but the values in them (lengths, cu_seqlens, page numbers) are only seen by the
// kernels, which clamp them. All memory comes from the caller, `scratch` aligned to 256 bytes. Each function
// that launches returns "" or what the CUDA runtime said.
//
// The library is all of csrc/cuda/*.cu, csrc/cuda/inst/*.cu and bind_cuda.cpp.
#pragma once
#include "../attention.h"

namespace attn::cuda {

using Stream = void*;  // a cudaStream_t

// out, and m and l where they are not null.
const char* forward(const Problem&, Stream);
// From m and l, which forward left.
const char* weights(const Problem&, const Weights&, Stream);
int64_t backward_scratch(const Problem&, const Backward&);  // bytes
const char* backward(const Problem&, const Backward&, void* scratch, Stream);
int64_t decode_scratch(const Decode&, int multiprocessors);  // bytes
const char* decode(const Decode&, int multiprocessors, void* scratch, Stream);

// The device itself: device.cu.
const char* unusable();  // "" or why nothing can run: a driver too old for the runtime in this library
int multiprocessors(int device);  // 0 where CUDA does not say
const char* fill(void* data, int byte, int64_t bytes, Stream);

}  // namespace attn::cuda
