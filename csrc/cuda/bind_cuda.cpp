// The ops `attn_cuda::*` of csrc/bind_ops.h over the CUDA kernels. With ATTN_HOST, over the same kernels run
// by the emulator in tests/cuda_host, on CPU tensors.
#include "../bind_ops.h"
#include "launch.h"
#include "torch_cuda.h"

namespace attn::cuda {
namespace {

using bind::Tensor;
using stable::Device;

#ifdef ATTN_HOST

constexpr const char* kKey = "CPU";

struct Queue {
  explicit Queue(Device) {}
  Stream stream = nullptr;
};

#else

constexpr const char* kKey = "CUDA";

class Guard {
 public:
  explicit Guard(int32_t device) { stable::must(aoti_torch_create_device_guard(device, &handle_)); }
  Guard(const Guard&) = delete;
  ~Guard() { aoti_torch_delete_device_guard(handle_); }

 private:
  DeviceGuardOpaque* handle_ = nullptr;
};

// The stream that torch uses on the device of the tensors, which is the current device as long as this lives.
struct Queue {
  explicit Queue(Device device) : guard(device.index) {
    stable::must(aoti_torch_get_current_cuda_stream(device.index, &stream));
  }
  Guard guard;
  Stream stream = nullptr;
};

#endif

// Becomes a RuntimeError in Python.
void must(const char* said) {
  if (*said != '\0') throw std::runtime_error(std::string("attn_cuda: ") + said);
}

// Memory that only the launches before the next op on the same stream use: torch gives it out again in stream
// order.
Tensor scratch(int64_t bytes, Device device) {
  static const int32_t f32 = aoti_torch_dtype_float32();
  return bind::empty_dense({(bytes + 3) / 4}, f32, device);
}

void require_dtype(Dtype dtype) {
  stable::require(dtype != Dtype::f64, "q must be float32, bfloat16 or float16");
}

struct Engine {
  static constexpr const char* kLibrary = "attn_cuda";
  static constexpr bool kReadsValues = false, kWeightsFromResiduals = true;

  static void forward(const Problem& p, const Weights* w, Device device) {
    require_dtype(p.dtype);
    const Queue queue(device);
    must(cuda::forward(p, queue.stream));
    if (w) must(cuda::weights(p, *w, queue.stream));
  }
  static void weights(const Problem& p, const Weights& w, Device device) {
    require_dtype(p.dtype);
    const Queue queue(device);
    must(cuda::weights(p, w, queue.stream));
  }
  static void backward(const Problem& p, const Backward& b, Device device) {
    require_dtype(p.dtype);
    const Tensor memory = scratch(backward_scratch(p, b), device);
    const Queue queue(device);
    must(cuda::backward(p, b, memory.data(), queue.stream));
  }
  static void decode(const Decode& d, Device device) {
    require_dtype(d.dtype);
    const int processors = multiprocessors(device.index);
    const Tensor memory = scratch(decode_scratch(d, processors), device);
    const Queue queue(device);
    must(cuda::decode(d, processors, memory.data(), queue.stream));
  }
  static void fill(void* data, int byte, int64_t bytes, Device device) {
    const Queue queue(device);
    must(cuda::fill(data, byte, bytes, queue.stream));
  }
};

using Ops = bind::Ops<Engine>;

struct Registered {
  Registered() : registration("attn_cuda", kKey) { Ops::add(registration); }
  stable::Registration registration;
};
const Registered registered;

}  // namespace
}  // namespace attn::cuda

// "" or one sentence: why nothing of this library can run on this machine.
ATTN_EXPORT const char* attn_cuda_unusable() { return attn::cuda::unusable(); }

// See Ops::poison in csrc/bind_ops.h.
ATTN_EXPORT void attn_cuda_poison(int on) { attn::cuda::Ops::poison(on != 0); }
