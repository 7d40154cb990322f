// What a call is to the C++ and CUDA kernels: plain pointers, strides and numbers, no torch.
//
// The fields are those of `Operands` in attn/spec.py, where their meaning is written; B batch, Hq/Hkv heads,
// L queries, S keys, D/Dv head dims. Strides count elements. Every pointer may be null where the call has no
// such operand.
#pragma once
#include <cstdint>

namespace attn {

enum class Dtype : int32_t { f32, bf16, f16, f64 };

// (B, H, rows, dim) with any strides but that of the last dim, which is 1.
struct Rows {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

// Broadcastable to (B, Hq, L, S): the stride of a broadcast dim is 0.
struct Dense {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, col = 0;
  Dtype dtype = Dtype::f32;  // not looked at where elements are bool
};

struct Problem {
  Dtype dtype = Dtype::f32;  // of q, k, v and out; m, l, lse are float, or double for f64
  int64_t B = 0, Hq = 0, Hkv = 0, L = 0, S = 0, D = 0, Dv = 0;
  int64_t N = 0;  // sequences of a packed call (B is 1 there), else 0
  Rows q, k, v, out;
  Dense bias, keep;                     // keep: bool, true = visible
  const float* alibi_slopes = nullptr;  // (B or N, Hq)
  const int32_t* key_lengths = nullptr;
  const int32_t* query_lengths = nullptr;
  const int64_t* ids_q = nullptr;
  const int64_t* ids_k = nullptr;
  const int32_t* prefix = nullptr;
  const int32_t* cu_seqlens_q = nullptr;
  const int32_t* cu_seqlens_k = nullptr;
  const int64_t* rng = nullptr;   // seed, offset
  int64_t left = -1, right = -1;  // -1 = unbounded
  bool end = false;
  double scale = 1.0, softcap = 0.0, dropout_p = 0.0;
  void* m = nullptr;  // (B, Hq, L), contiguous
  void* l = nullptr;
};

// Probabilities after dropout: (B, L, S) averaged over the heads, or (B, Hq, L, S); contiguous, of the call's
// dtype.
struct Weights {
  void* data = nullptr;
  bool average = true;
};

// dq, dk, dv have any strides but that of the last dim; d_bias is contiguous in bias's own 4-D shape, given
// by the strides of `d_bias` (0 = broadcast in the bias, summed here).
struct Backward {
  Rows d_out;
  const void* d_lse = nullptr;  // (B, Hq, L) contiguous, type of m; may be null
  Dense d_weights;              // of the call's dtype; head stride 0 where averaged; data null if none
  bool average = true;
  Rows dq, dk, dv;
  Dense d_bias;
};

struct Decode {
  Dtype dtype = Dtype::f32;
  int64_t B = 0, Hq = 0, Hkv = 0, L = 0, D = 0, Dv = 0;
  int64_t slots = 0;   // keys per row of a contiguous cache, or per page
  int64_t pages = 0;   // columns of block_table, 0 if contiguous
  int64_t blocks = 0;  // pages that the cache has, 0 if contiguous
  Rows q, k, v, out;   // batch stride of k, v: per sequence, or per page
  const int32_t* lengths = nullptr;
  const int32_t* block_table = nullptr;  // (B, pages)
  const float* alibi_slopes = nullptr;
  int64_t left = -1, right = 0;
  double scale = 1.0, softcap = 0.0;
  void* lse = nullptr;  // (B, Hq, L) contiguous, type of m
};

}  // namespace attn
