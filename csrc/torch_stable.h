// The part of torch's stable C interface that is used here, declared by us: the build needs no torch, and one
// build serves every torch from 2.10 on. tests/test_binding.py compiles this beside torch's own headers.
#pragma once
#include <cstdint>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <utility>

#ifdef _WIN32
#define ATTN_TORCH_API __declspec(dllimport)
#else
#define ATTN_TORCH_API __attribute__((visibility("default")))
#endif

struct AtenTensorOpaque;
struct DeviceGuardOpaque;
struct TorchLibraryOpaque;

// Every function below is found by name in this text when an import library is made for Windows: one a
// statement.
extern "C" {
ATTN_TORCH_API int32_t aoti_torch_dtype_float32();
ATTN_TORCH_API int32_t aoti_torch_dtype_bfloat16();
ATTN_TORCH_API int32_t aoti_torch_dtype_float16();
ATTN_TORCH_API int32_t aoti_torch_dtype_float64();
ATTN_TORCH_API int32_t aoti_torch_dtype_int32();
ATTN_TORCH_API int32_t aoti_torch_dtype_int64();
ATTN_TORCH_API int32_t aoti_torch_dtype_bool();
ATTN_TORCH_API int32_t aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t,
                                                    TorchLibraryOpaque**);
ATTN_TORCH_API int32_t aoti_torch_delete_library_object(TorchLibraryOpaque*);
ATTN_TORCH_API int32_t torch_library_impl(TorchLibraryOpaque*, const char*,
                                          void (*)(uint64_t*, uint64_t, uint64_t), uint64_t);
ATTN_TORCH_API int32_t aoti_torch_delete_tensor_object(AtenTensorOpaque*);
ATTN_TORCH_API int32_t aoti_torch_new_uninitialized_tensor(AtenTensorOpaque**);
ATTN_TORCH_API int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t,
                                                int32_t, AtenTensorOpaque**);
ATTN_TORCH_API int32_t aoti_torch_copy_(AtenTensorOpaque*, AtenTensorOpaque*, int32_t);
ATTN_TORCH_API int32_t aoti_torch_get_data_ptr(AtenTensorOpaque*, void**);
ATTN_TORCH_API int32_t torch_get_const_data_ptr(AtenTensorOpaque*, const void**);
ATTN_TORCH_API int32_t aoti_torch_get_dim(AtenTensorOpaque*, int64_t*);
ATTN_TORCH_API int32_t aoti_torch_get_sizes(AtenTensorOpaque*, int64_t**);
ATTN_TORCH_API int32_t aoti_torch_get_strides(AtenTensorOpaque*, int64_t**);
ATTN_TORCH_API int32_t aoti_torch_get_dtype(AtenTensorOpaque*, int32_t*);
ATTN_TORCH_API int32_t aoti_torch_get_device_type(AtenTensorOpaque*, int32_t*);
ATTN_TORCH_API int32_t aoti_torch_get_device_index(AtenTensorOpaque*, int32_t*);
ATTN_TORCH_API int32_t aoti_torch_zero_(AtenTensorOpaque*);
ATTN_TORCH_API int32_t aoti_torch_create_device_guard(int32_t, DeviceGuardOpaque**);
ATTN_TORCH_API int32_t aoti_torch_delete_device_guard(DeviceGuardOpaque*);
ATTN_TORCH_API int32_t torch_parallel_for(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*),
                                          void*);
ATTN_TORCH_API int32_t torch_get_num_threads(uint32_t*);
}

namespace attn::stable {

constexpr uint64_t kTorchAbi =
    (uint64_t(2) << 56) | (uint64_t(10) << 48);  // how arguments are passed: as torch 2.10 does

// Becomes a ValueError in Python, with this text alone.
template <class... A>
[[noreturn]] void fail(const A&... words) {
  std::ostringstream text;
  (text << ... << words);
  throw std::invalid_argument(text.str());
}

template <class... A>
inline void require(bool holds, const A&... words) {
  if (!holds) fail(words...);
}

// torch has already printed the reason where a call of its interface fails.
inline void must(int32_t status) {
  if (status != 0) throw std::runtime_error("attn: a call into torch failed; its reason is printed above");
}

constexpr int kMaxDims = 4;

struct Device {
  int32_t type = -1, index = -1;

  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

// Owns one handle; sizes and strides are torch's own arrays, valid as long as the handle.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorOpaque* handle) noexcept : handle_(handle) {}
  Tensor(Tensor&& other) noexcept { swap(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  explicit operator bool() const { return handle_ != nullptr; }
  int64_t dims() const { return dims_; }
  int64_t size(int i) const { return sizes_[i]; }
  int64_t stride(int i) const { return strides_[i]; }
  int32_t dtype() const { return dtype_; }
  Device device() const { return device_; }
  void* data() const { return data_; }

  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0; i < dims_; ++i) n *= sizes_[i];
    return n;
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int64_t i = dims_ - 1; i >= 0; --i) {
      if (sizes_[i] != 1 && strides_[i] != expected) return numel() == 0;
      expected *= sizes_[i];
    }
    return true;
  }

  // An argument, owned at once; `look` reads what it is, and may throw.
  static Tensor input(uint64_t word) noexcept { return Tensor(reinterpret_cast<AtenTensorOpaque*>(word)); }
  // An argument of type `Tensor?`: the word is 0, or points to a word on the heap that is ours to free.
  static Tensor optional(uint64_t word) noexcept {
    if (word == 0) return Tensor();
    auto* inner = reinterpret_cast<uint64_t*>(word);
    const uint64_t handle = *inner;
    delete inner;
    return input(handle);
  }
  // Arguments are never written: const data, so that memory shared until written stays shared.
  void look() {
    if (!handle_) return;
    describe();
    const void* data = nullptr;
    must(torch_get_const_data_ptr(handle_, &data));
    data_ = const_cast<void*>(data);
    require(data_ || numel() == 0,
            "attn: a tensor has no memory: its storage was freed, or it wraps another");
  }
  // With memory but no values.
  static Tensor empty(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                      Device device) {
    AtenTensorOpaque* handle = nullptr;
    must(aoti_torch_empty_strided(dims, sizes, strides, dtype, device.type, device.index, &handle));
    Tensor t(handle);
    t.describe();
    must(aoti_torch_get_data_ptr(handle, &t.data_));
    return t;
  }
  // The same values one after another in memory: itself, or a copy.
  Tensor made_contiguous() && {
    if (contiguous()) return std::move(*this);
    int64_t strides[kMaxDims], n = 1;
    for (int64_t i = dims_ - 1; i >= 0; --i) {
      strides[i] = n;
      n *= sizes_[i];
    }
    Tensor copy = empty(dims_, sizes_, strides, dtype_, device_);
    must(aoti_torch_copy_(copy.handle_, handle_, 0));
    return copy;
  }

  void zero() { must(aoti_torch_zero_(handle_)); }

  // To Python, which then owns it; a tensor that is not there becomes None.
  uint64_t release() {
    if (!handle_) must(aoti_torch_new_uninitialized_tensor(&handle_));
    return reinterpret_cast<uint64_t>(std::exchange(handle_, nullptr));
  }

 private:
  void describe() {
    must(aoti_torch_get_dim(handle_, &dims_));
    require(dims_ <= kMaxDims, "attn: a tensor has ", dims_, " dims; at most ", kMaxDims, " are taken");
    must(aoti_torch_get_sizes(handle_, &sizes_));
    must(aoti_torch_get_strides(handle_, &strides_));
    must(aoti_torch_get_dtype(handle_, &dtype_));
    must(aoti_torch_get_device_type(handle_, &device_.type));
    must(aoti_torch_get_device_index(handle_, &device_.index));
  }
  void swap(Tensor& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(dims_, other.dims_);
    std::swap(sizes_, other.sizes_);
    std::swap(strides_, other.strides_);
    std::swap(dtype_, other.dtype_);
    std::swap(device_, other.device_);
    std::swap(data_, other.data_);
  }

  AtenTensorOpaque* handle_ = nullptr;
  int64_t dims_ = 0;
  int64_t* sizes_ = nullptr;
  int64_t* strides_ = nullptr;
  int32_t dtype_ = -1;
  Device device_;
  void* data_ = nullptr;
};

// Numbers arrive in the word itself.
inline double real(uint64_t word) {
  double value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}
inline int64_t integer(uint64_t word) { return static_cast<int64_t>(word); }
inline bool boolean(uint64_t word) { return (word & 0xff) != 0; }

// Kernels of one dispatch key, registered while the object lives.
class Registration {
 public:
  Registration(const char* ns, const char* key) {
    must(aoti_torch_library_init_impl(ns, key, __FILE__, __LINE__, &library_));
  }
  ~Registration() { aoti_torch_delete_library_object(library_); }
  Registration& add(const char* op, void (*kernel)(uint64_t*, uint64_t, uint64_t)) {
    must(torch_library_impl(library_, op, kernel, kTorchAbi));
    return *this;
  }

 private:
  TorchLibraryOpaque* library_ = nullptr;
};

}  // namespace attn::stable
