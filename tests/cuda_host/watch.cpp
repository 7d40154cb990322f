// Between the binding and the kernels: tells the emulator which memory a call may touch, and checks
// afterwards that every element of its results was stored. The linker puts these in the way (--wrap, see
// build.py), so that the library's own sources know nothing of it.
#include <string>

#include "../../csrc/cuda/launch.h"
#include "emulator/emulator.h"

namespace {

using attn::Backward;
using attn::Decode;
using attn::Dense;
using attn::Dtype;
using attn::Problem;
using attn::Rows;
using attn::Weights;
using emu::Access;

int64_t bytes_of(Dtype d) { return d == Dtype::f64 ? 8 : d == Dtype::f32 ? 4 : 2; }

struct Watch {
  emu::Memory& memory = emu::memory();
  Watch() { memory.clear(); }

  void rows(const char* label, const Rows& r, Dtype d, int64_t B, int64_t H, int64_t n, int64_t width,
            Access access) {
    memory.add(label, r.data, bytes_of(d), {{B, r.batch}, {H, r.head}, {n, r.row}, {width, 1}}, access);
  }
  void dense(const char* label, const Dense& x, int64_t bytes, const Problem& p, Access access) {
    memory.add(label, x.data, bytes, {{p.B, x.batch}, {p.Hq, x.head}, {p.L, x.row}, {p.S, x.col}}, access);
  }
  void vector(const char* label, const void* data, int64_t bytes, int64_t n, Access access = Access::Input) {
    memory.add(label, data, bytes, {{n, 1}}, access);
  }
  void residuals(const Problem& p, Access access) {
    vector("m", p.m, 4, p.B * p.Hq * p.L, access);
    vector("l", p.l, 4, p.B * p.Hq * p.L, access);
  }

  void operands(const Problem& p) {
    const int64_t sequences = p.N ? p.N : p.B;
    rows("q", p.q, p.dtype, p.B, p.Hq, p.L, p.D, Access::Input);
    rows("k", p.k, p.dtype, p.B, p.Hkv, p.S, p.D, Access::Input);
    rows("v", p.v, p.dtype, p.B, p.Hkv, p.S, p.Dv, Access::Input);
    dense("bias", p.bias, bytes_of(p.bias.dtype), p, Access::Input);
    dense("keep", p.keep, 1, p, Access::Input);
    vector("alibi_slopes", p.alibi_slopes, 4, sequences * p.Hq);
    vector("key_lengths", p.key_lengths, 4, sequences);
    vector("query_lengths", p.query_lengths, 4, sequences);
    vector("ids_q", p.ids_q, 8, p.B * p.L);
    vector("ids_k", p.ids_k, 8, p.B * p.S);
    vector("prefix", p.prefix, 4, sequences);
    vector("cu_seqlens_q", p.cu_seqlens_q, 4, p.N + 1);
    vector("cu_seqlens_k", p.cu_seqlens_k, 4, p.N + 1);
    vector("rng", p.rng, 8, 2);
  }

  void gradients(const Problem& p, const Backward& b) {
    rows("d_out", b.d_out, p.dtype, p.B, p.Hq, p.L, p.Dv, Access::Input);
    vector("d_lse", b.d_lse, 4, p.B * p.Hq * p.L);
    dense("d_weights", b.d_weights, bytes_of(p.dtype), p, Access::Input);
    rows("dq", b.dq, p.dtype, p.B, p.Hq, p.L, p.D, Access::Output);
    rows("dk", b.dk, p.dtype, p.B, p.Hkv, p.S, p.D, Access::Output);
    rows("dv", b.dv, p.dtype, p.B, p.Hkv, p.S, p.Dv, Access::Output);
    dense("d_bias", b.d_bias, bytes_of(b.d_bias.dtype), p, Access::Output);
  }

  void cache(const Decode& d) {
    const int64_t parts = d.pages ? d.blocks : d.B;
    rows("q", d.q, d.dtype, d.B, d.Hq, d.L, d.D, Access::Input);
    rows("k_cache", d.k, d.dtype, parts, d.Hkv, d.slots, d.D, Access::Input);
    rows("v_cache", d.v, d.dtype, parts, d.Hkv, d.slots, d.Dv, Access::Input);
    vector("lengths", d.lengths, 4, d.B);
    vector("block_table", d.block_table, 4, d.B * d.pages);
    vector("alibi_slopes", d.alibi_slopes, 4, d.B * d.Hq);
    rows("out", d.out, d.dtype, d.B, d.Hq, d.L, d.Dv, Access::Output);
    vector("lse", d.lse, 4, d.B * d.Hq * d.L, Access::Output);
  }

  void scratch(void* data, int64_t bytes) { vector("scratch", data, 4, bytes / 4, Access::Scratch); }

  // What the launches said, else whether something is missing.
  const char* verdict(const char* said) {
    if (*said != '\0') return said;
    static std::string message;
    message = memory.gaps().message;
    return message.c_str();
  }
};

}  // namespace

// The symbols as the compiler names them; build.py reads them here.
#define FORWARD "_ZN4attn4cuda7forwardERKNS_7ProblemEPv"
#define WEIGHTS "_ZN4attn4cuda7weightsERKNS_7ProblemERKNS_7WeightsEPv"
#define BACKWARD "_ZN4attn4cuda8backwardERKNS_7ProblemERKNS_8BackwardEPvS7_"
#define DECODE "_ZN4attn4cuda6decodeERKNS_6DecodeEiPvS4_"

namespace watch {

using attn::cuda::Stream;

const char* kernels_forward(const Problem&, Stream) __asm__("__real_" FORWARD);
const char* kernels_weights(const Problem&, const Weights&, Stream) __asm__("__real_" WEIGHTS);
const char* kernels_backward(const Problem&, const Backward&, void*, Stream) __asm__("__real_" BACKWARD);
const char* kernels_decode(const Decode&, int, void*, Stream) __asm__("__real_" DECODE);

const char* forward(const Problem&, Stream) __asm__("__wrap_" FORWARD);
const char* weights(const Problem&, const Weights&, Stream) __asm__("__wrap_" WEIGHTS);
const char* backward(const Problem&, const Backward&, void*, Stream) __asm__("__wrap_" BACKWARD);
const char* decode(const Decode&, int, void*, Stream) __asm__("__wrap_" DECODE);

const char* forward(const Problem& p, Stream stream) {
  Watch w;
  w.operands(p);
  w.rows("out", p.out, p.dtype, p.B, p.Hq, p.L, p.Dv, Access::Output);
  w.residuals(p, Access::Output);
  return w.verdict(kernels_forward(p, stream));
}

const char* weights(const Problem& p, const Weights& wanted, Stream stream) {
  Watch w;
  w.operands(p);
  w.residuals(p, Access::Input);
  const int64_t n = p.B * (wanted.average ? 1 : p.Hq) * p.L * p.S;
  w.vector("weights", wanted.data, bytes_of(p.dtype), n, Access::Output);
  return w.verdict(kernels_weights(p, wanted, stream));
}

const char* backward(const Problem& p, const Backward& b, void* scratch, Stream stream) {
  Watch w;
  w.operands(p);
  w.rows("out", p.out, p.dtype, p.B, p.Hq, p.L, p.Dv, Access::Input);
  w.residuals(p, Access::Input);
  w.gradients(p, b);
  w.scratch(scratch, attn::cuda::backward_scratch(p, b));
  return w.verdict(kernels_backward(p, b, scratch, stream));
}

const char* decode(const Decode& d, int multiprocessors, void* scratch, Stream stream) {
  Watch w;
  w.cache(d);
  w.scratch(scratch, attn::cuda::decode_scratch(d, multiprocessors));
  return w.verdict(kernels_decode(d, multiprocessors, scratch, stream));
}

}  // namespace watch
