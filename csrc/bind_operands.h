// From the tensors and numbers of a call (`Operands` in attn/spec.py) to a `Problem`: shapes, dtypes and the
// values that point somewhere are checked here, so that a kernel never reads outside a tensor whatever it is
// given. Where values cannot be looked at (on a GPU that would stop the queue), the kernels clamp them.
#pragma once
#include <algorithm>
#include <initializer_list>

#include "attention.h"
#include "torch_stable.h"

namespace attn::bind {

using stable::Device;
using stable::fail;
using stable::require;
using stable::Tensor;

inline Dtype dtype_of(const char* name, const Tensor& t) {
  static const int32_t f32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16(),
                       f16 = aoti_torch_dtype_float16(), f64 = aoti_torch_dtype_float64();
  if (t.dtype() == f32) return Dtype::f32;
  if (t.dtype() == bf16) return Dtype::bf16;
  if (t.dtype() == f16) return Dtype::f16;
  require(t.dtype() == f64, name, " must be float32, bfloat16, float16 or float64");
  return Dtype::f64;
}

inline int32_t torch_dtype(Dtype d) {
  static const int32_t codes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                  aoti_torch_dtype_float16(), aoti_torch_dtype_float64()};
  return codes[static_cast<int>(d)];
}

inline Dtype accumulate(Dtype d) { return d == Dtype::f64 ? Dtype::f64 : Dtype::f32; }
inline size_t bytes(Dtype d) { return d == Dtype::f64 ? 8 : d == Dtype::f32 ? 4 : 2; }

inline void require_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  bool same = t.dims() == static_cast<int64_t>(sizes.size());
  int i = 0;
  for (const int64_t n : sizes) same = same && t.size(i++) == n;
  if (same) return;
  std::ostringstream wanted;
  for (const int64_t n : sizes) wanted << (wanted.tellp() > 0 ? ", " : "") << n;
  fail(name, " must have shape (", wanted.str(), ")");
}

// (B, H, rows, dim) as the kernels read it; copied only where the last dim is not dense.
inline Rows rows_of(const char* name, Tensor& t, Dtype dtype) {
  require(t.dims() == 4, name, " must have 4 dims, not ", t.dims());
  require(t.dtype() == torch_dtype(dtype), name, " must have the dtype of q");
  if (t.size(3) > 1 && t.stride(3) != 1) t = std::move(t).made_contiguous();
  return {t.data(), t.stride(0), t.stride(1), t.stride(2)};
}

// One number per entry, densely; T is what the kernels read.
template <class T>
const T* vector_of(const char* name, Tensor& t, int32_t dtype, std::initializer_list<int64_t> sizes) {
  if (!t) return nullptr;
  require_shape(name, t, sizes);
  require(t.dtype() == dtype, name, " has a dtype that the kernels do not read");
  t = std::move(t).made_contiguous();
  return static_cast<const T*>(t.data());
}

template <class T>
void require_range(const char* name, const T* values, int64_t n, int64_t low, int64_t high) {
  for (int64_t i = 0; values && i < n; ++i) {
    if (values[i] < low || values[i] > high)
      fail(name, "[", i, "] is ", values[i], "; it must be in [", low, ", ", high, "]");
  }
}

inline void require_cumulative(const char* name, const int32_t* values, int64_t n, int64_t total) {
  require(values[0] == 0, name, "[0] is ", values[0], "; it must be 0");
  for (int64_t i = 0; i < n; ++i)
    require(values[i + 1] >= values[i], name, "[", i + 1, "] is ", values[i + 1],
            "; it must be >= ", values[i]);
  require(values[n] <= total, name, "[", n, "] is ", values[n], "; there are only ", total, " tokens");
}

// 4 dims, each 1 or that of (B, Hq, L, S).
inline Dense dense_of(const char* name, const Tensor& t, const Problem& p) {
  if (!t) return {};
  const int64_t full[] = {p.B, p.Hq, p.L, p.S};
  require(t.dims() == 4, name, " must have 4 dims, not ", t.dims());
  int64_t stride[4];
  for (int i = 0; i < 4; ++i) {
    require(t.size(i) == 1 || t.size(i) == full[i], name, " must broadcast to (B, Hq, L, S) in dim ", i);
    stride[i] = t.size(i) == 1 ? 0 : t.stride(i);
  }
  return {t.data(), stride[0], stride[1], stride[2], stride[3], Dtype::f32};
}

// A side of the band; beyond any length it is the same as no limit, and sums of it cannot overflow.
inline int64_t side(int64_t n) { return n < 0 ? -1 : std::min<int64_t>(n, int64_t(1) << 40); }

// Outputs in the memory layout (B, rows, H, width), whose shape is (B, H, rows, width).
inline Tensor empty_rows(int64_t B, int64_t H, int64_t rows, int64_t width, Dtype dtype, Device device) {
  const int64_t sizes[] = {B, H, rows, width};
  const int64_t strides[] = {rows * H * width, width, H * width, 1};
  return Tensor::empty(4, sizes, strides, torch_dtype(dtype), device);
}
inline Tensor empty_dense(std::initializer_list<int64_t> sizes, int32_t dtype, Device device) {
  int64_t strides[stable::kMaxDims], n = 1;
  for (int i = static_cast<int>(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = n;
    n *= sizes.begin()[i];
  }
  return Tensor::empty(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype, device);
}
inline Tensor empty_dense(std::initializer_list<int64_t> sizes, Dtype dtype, Device device) {
  return empty_dense(sizes, torch_dtype(dtype), device);
}

// A pointer to another device's memory is not one.
inline void require_device(const char* name, const Tensor& t, Device device) {
  require(!t || t.device() == device, name, " must be on the device of q");
}

// The tensors of a call, kept alive as long as the problem that points into them.
struct Call {
  enum {
    q,
    k,
    v,
    bias,
    keep,
    alibi_slopes,
    key_lengths,
    query_lengths,
    ids_q,
    ids_k,
    prefix,
    cu_q,
    cu_k,
    rng,
    count
  };
  static constexpr int kNumbers =
      8;  // left, right, end, max_seqlen_q, max_seqlen_k, scale, softcap, dropout_p
  static constexpr int kWords = count + kNumbers;
  static constexpr int kPlainWords = 8;  // q, k, v, left, right, end, scale, softcap

  explicit Call(bool reads_values) : reads_values_(reads_values) {}

  Tensor t[count];
  Problem p;

  // Words in the order of `Operands`. Owns every tensor before anything can throw.
  void own(const uint64_t* words) noexcept {
    for (int i = 0; i < count; ++i) t[i] = i <= v ? Tensor::input(words[i]) : Tensor::optional(words[i]);
  }
  void own_plain(const uint64_t* words) noexcept {
    for (int i = q; i <= v; ++i) t[i] = Tensor::input(words[i]);
  }

  void read(const uint64_t* words) {
    for (Tensor& each : t) {
      each.look();
      require_device("every tensor of a call", each, device());
    }
    const uint64_t* n = words + count;
    numbers(n[0], n[1], n[2], n[5], n[6]);
    p.dropout_p = stable::real(n[7]);
    basic();
    masks();
    tables();
  }
  void read_plain(const uint64_t* words) {
    for (int i = q; i <= v; ++i) {
      t[i].look();
      require_device("every tensor of a call", t[i], device());
    }
    numbers(words[3], words[4], words[5], words[6], words[7]);
    basic();
  }

  Device device() const { return t[q].device(); }

 private:
  void numbers(uint64_t left, uint64_t right, uint64_t end, uint64_t scale, uint64_t softcap) {
    p.left = side(stable::integer(left));
    p.right = side(stable::integer(right));
    p.end = stable::boolean(end);
    p.scale = stable::real(scale);
    p.softcap = stable::real(softcap);
  }

  void basic() {
    p.dtype = dtype_of("q", t[q]);
    p.q = rows_of("q", t[q], p.dtype);
    p.k = rows_of("k", t[k], p.dtype);
    p.v = rows_of("v", t[v], p.dtype);
    p.B = t[q].size(0);
    p.Hq = t[q].size(1);
    p.L = t[q].size(2);
    p.D = t[q].size(3);
    p.Hkv = t[k].size(1);
    p.S = t[k].size(2);
    p.Dv = t[v].size(3);
    require(t[k].size(0) == p.B && t[v].size(0) == p.B, "q, k and v must have the same batch size");
    require(t[v].size(1) == p.Hkv && t[v].size(2) == p.S, "k and v must agree in heads and length");
    require(p.Hkv == p.Hq || (p.Hkv > 0 && p.Hq % p.Hkv == 0), "q's heads must be a multiple of k's");
    require(t[k].size(3) == p.D && p.D >= 1 && p.Dv >= 1,
            "q and k must share a head_dim >= 1, v have one >= 1");
    require(std::max(p.D, p.Dv) <= 256, "head_dim must be at most 256");
  }

  void masks() {
    const int64_t seqs = sequences();
    static const int32_t i32 = aoti_torch_dtype_int32(), i64 = aoti_torch_dtype_int64(),
                         truth = aoti_torch_dtype_bool(), f32 = aoti_torch_dtype_float32();
    p.bias = dense_of("bias", t[bias], p);
    if (t[bias]) p.bias.dtype = dtype_of("bias", t[bias]);
    p.keep = dense_of("keep", t[keep], p);
    require(!t[keep] || t[keep].dtype() == truth, "keep must be bool");
    p.alibi_slopes = vector_of<float>("alibi_slopes", t[alibi_slopes], f32, {seqs, p.Hq});
    p.key_lengths = vector_of<int32_t>("key_lengths", t[key_lengths], i32, {seqs});
    p.query_lengths = vector_of<int32_t>("query_lengths", t[query_lengths], i32, {seqs});
    p.ids_q = vector_of<int64_t>("ids_q", t[ids_q], i64, {p.B, p.L});
    p.ids_k = vector_of<int64_t>("ids_k", t[ids_k], i64, {p.B, p.S});
    p.prefix = vector_of<int32_t>("prefix", t[prefix], i32, {seqs});
    require(bool(t[ids_q]) == bool(t[ids_k]), "ids_q and ids_k must be given together");
    if (reads_values_) {
      require_range("key_lengths", p.key_lengths, seqs, 0, p.S);
      require_range("query_lengths", p.query_lengths, seqs, 0, p.L);
      require_range("prefix", p.prefix, seqs, 0, INT32_MAX);
    }
    p.rng = vector_of<int64_t>("rng", t[rng], i64, {2});
    require(p.dropout_p >= 0 && p.dropout_p <= 1, "dropout_p is ", p.dropout_p, "; it must be in [0, 1]");
    require(p.dropout_p == 0 || p.rng, "rng must be given where dropout_p > 0");
  }

  void tables() {
    require(bool(t[cu_q]) == bool(t[cu_k]), "cu_seqlens_q and cu_seqlens_k must be given together");
    if (!t[cu_q]) return;
    static const int32_t i32 = aoti_torch_dtype_int32();
    p.N = sequences();
    require(p.B == 1, "a packed call has batch size 1, not ", p.B);
    require(!t[bias] && !t[keep] && !t[ids_q], "a packed call takes no bias, keep or documents");
    if (p.N == 0) no_sequences(i32);
    p.cu_seqlens_q = vector_of<int32_t>("cu_seqlens_q", t[cu_q], i32, {p.N + 1});
    p.cu_seqlens_k = vector_of<int32_t>("cu_seqlens_k", t[cu_k], i32, {p.N + 1});
    if (!reads_values_) return;
    require_cumulative("cu_seqlens_q", p.cu_seqlens_q, p.N, p.L);
    require_cumulative("cu_seqlens_k", p.cu_seqlens_k, p.N, p.S);
  }

  // One sequence without tokens: N = 0 would mean a padded call.
  void no_sequences(int32_t i32) {
    p.N = 1;
    for (Tensor* each : {&t[cu_q], &t[cu_k]}) {
      require_shape("cu_seqlens", *each, {1});
      *each = empty_dense({2}, i32, device());
      each->zero();
    }
    p.alibi_slopes = nullptr;
    p.key_lengths = p.query_lengths = p.prefix = nullptr;
  }

  int64_t sequences() const {
    if (!t[cu_q]) return p.B;
    require(t[cu_q].dims() == 1 && t[cu_q].size(0) >= 1, "cu_seqlens_q must have shape (sequences + 1,)");
    return t[cu_q].size(0) - 1;
  }

  bool reads_values_;
};

}  // namespace attn::bind
