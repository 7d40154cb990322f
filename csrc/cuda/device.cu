// What the binding asks of the device and its driver.
#include <cuda_runtime.h>

#include <atomic>
#include <cstdio>

#include "launch.h"

namespace attn::cuda {

const char* unusable() {
  int driver = 0;
  const cudaError_t status = cudaDriverGetVersion(&driver);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  constexpr int kRuntime = CUDART_VERSION / 1000;  // a driver runs every runtime of its major version
  if (driver / 1000 >= kRuntime) return "";
  static char text[160];
  if (driver == 0)
    std::snprintf(text, sizeof text, "finds no NVIDIA driver; CUDA %d needs driver %s or newer", kRuntime,
                  kRuntime >= 13 ? "580" : "525");
  else
    std::snprintf(text, sizeof text,
                  "needs NVIDIA driver %s or newer, for CUDA %d; the one here is for CUDA %d.%d at most",
                  kRuntime >= 13 ? "580" : "525", kRuntime, driver / 1000, driver % 1000 / 10);
  return text;
}

int multiprocessors(int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  const bool cached = device >= 0 && device < kDevices;
  int n = cached ? known[device].load(std::memory_order_relaxed) : 0;
  if (n != 0) return n;
  if (cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    cudaGetLastError();  // taken, so that the next launch does not report it
    return 0;
  }
  if (cached) known[device].store(n, std::memory_order_relaxed);
  return n;
}

const char* fill(void* data, int byte, int64_t bytes, Stream stream) {
  const cudaError_t status =
      cudaMemsetAsync(data, byte, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream));
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
}

}  // namespace attn::cuda
