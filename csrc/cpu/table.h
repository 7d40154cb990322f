// The table of one instruction set's kernels: element types are told apart here. Included last by isa_*.cpp.
#pragma once
#include "decode.h"
#include "forward.h"
#include "peak.h"

// Defined in isa_f64.cpp and backward_f64.cpp: float64 for all sets.
namespace attn::cpu::f64 {
void forward(const Problem&, const Weights*);
void weights(const Problem&, const Weights&);
void backward(const Problem&, const Backward&);
void decode(const Decode&);
}  // namespace attn::cpu::f64

namespace attn::cpu::ATTN_ISA {

void backward(const Problem&, const Backward&);  // backward_*.cpp

#if defined(ATTN_DOUBLE)
void forward(const Problem& p, const Weights* w) { forward_of<double>(p, w); }
void weights(const Problem& p, const Weights& w) { weights_of<double>(p, w); }
void decode(const Decode& d) { decode_of<double>(d); }
#elif defined(ATTN_PAIRS)
}  // namespace attn::cpu::ATTN_ISA

namespace attn::cpu::avx512 {
extern const Kernels table;
}

namespace attn::cpu::ATTN_ISA {
namespace {

void forward(const Problem& p, const Weights* w) {
  return p.dtype == Dtype::bf16 ? forward_of<Bf16>(p, w) : avx512::table.forward(p, w);
}
void weights(const Problem& p, const Weights& w) {
  return p.dtype == Dtype::bf16 ? weights_of<Bf16>(p, w) : avx512::table.weights(p, w);
}
void any_backward(const Problem& p, const Backward& b) {
  return p.dtype == Dtype::bf16 ? backward(p, b) : avx512::table.backward(p, b);
}
void decode(const Decode& d) { avx512::table.decode(d); }  // waits for memory
double float_multiply_adds(int64_t rounds) { return avx512::table.multiply_adds(rounds); }

}  // namespace

extern const Kernels table;
const Kernels table = {ATTN_ISA_NAME,       forward,      weights, any_backward, decode,
                       float_multiply_adds, multiply_adds};
#else
namespace {

void forward(const Problem& p, const Weights* w) {
  switch (p.dtype) {
    case Dtype::f32:
      return forward_of<float>(p, w);
    case Dtype::bf16:
      return forward_of<Bf16>(p, w);
    case Dtype::f16:
      return forward_of<F16>(p, w);
    default:
      return f64::forward(p, w);
  }
}
void weights(const Problem& p, const Weights& w) {
  switch (p.dtype) {
    case Dtype::f32:
      return weights_of<float>(p, w);
    case Dtype::bf16:
      return weights_of<Bf16>(p, w);
    case Dtype::f16:
      return weights_of<F16>(p, w);
    default:
      return f64::weights(p, w);
  }
}
void any_backward(const Problem& p, const Backward& b) {
  return p.dtype == Dtype::f64 ? f64::backward(p, b) : backward(p, b);
}
void decode(const Decode& d) {
  switch (d.dtype) {
    case Dtype::f32:
      return decode_of<float>(d);
    case Dtype::bf16:
      return decode_of<Bf16>(d);
    case Dtype::f16:
      return decode_of<F16>(d);
    default:
      return f64::decode(d);
  }
}

}  // namespace

extern const Kernels table;
const Kernels table = {ATTN_ISA_NAME, forward, weights, any_backward, decode, multiply_adds, nullptr};
#endif

}  // namespace attn::cpu::ATTN_ISA
