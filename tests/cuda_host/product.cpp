// The small kernel of product_kernel.cuh against double sums: sizes at the boundaries of its predicates,
// early, late and random copies, warps in several orders, shared memory moved.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "emulator/emulator.h"
#include "product_kernel.cuh"

namespace {

namespace prim = attn::cuda::prim;

struct Size {
  int rows, cols, depth;
};

std::mt19937 generator(7);

template <class T>
std::vector<T> draw(int n) {
  std::normal_distribution<float> normal;
  std::vector<T> v(static_cast<size_t>(n));
  for (T& x : v) x = prim::from_float<T>(normal(generator));
  return v;
}

// "" or what is wrong.
template <class T>
std::string run(Size s) {
  const std::vector<T> a = draw<T>(s.rows * s.depth), b = draw<T>(s.cols * s.depth);
  std::vector<float> c(static_cast<size_t>(s.rows * s.cols), NAN);
  emu::Memory& memory = emu::memory();
  memory.clear();
  memory.add("a", a.data(), 2, {{s.rows, s.depth}, {s.depth, 1}}, emu::Access::Input);
  memory.add("b", b.data(), 2, {{s.cols, s.depth}, {s.depth, 1}}, emu::Access::Input);
  memory.add("c", c.data(), 4, {{s.rows, s.cols}, {s.cols, 1}}, emu::Access::Output);
  using Kernel = product::Product<T>;
  const prim::Grid grid{(s.rows + 63) / 64, (s.cols + 63) / 64, 1};
  const std::string said =
      prim::launch<Kernel>({a.data(), b.data(), c.data(), s.rows, s.cols, s.depth}, grid, nullptr);
  if (!said.empty()) return said;
  if (!memory.gaps().ok()) return memory.gaps().message;
  for (int i = 0; i < s.rows; ++i)
    for (int j = 0; j < s.cols; ++j) {
      double sum = 0, size = 0;
      for (int k = 0; k < s.depth; ++k) {
        const double x = double(prim::to_float(a[size_t(i * s.depth + k)])) *
                         double(prim::to_float(b[size_t(j * s.depth + k)]));
        sum += x;
        size += std::fabs(x);
      }
      const double error = std::fabs(double(c[size_t(i * s.cols + j)]) - sum);
      if (!(error <= size * s.depth * 0x1p-24))
        return "numbers at " + std::to_string(i) + "," + std::to_string(j);
    }
  return "";
}

}  // namespace

int main() {
  const Size sizes[] = {{64, 64, 64}, {1, 1, 8}, {63, 65, 72}, {65, 63, 56}, {100, 70, 136}, {64, 128, 192}};
  int failed = 0, n = 0;
  for (const Size& s : sizes)
    for (int half = 0; half < 2; ++half) {
      emu::options() = {};
      emu::options().async = emu::Async(n % 3);
      emu::options().seed = uint64_t(n % 4);
      emu::options().smem_shift = uint32_t(n % 5) * 128;
      const std::string wrong = half ? run<prim::fp16>(s) : run<prim::bf16>(s);
      if (!wrong.empty()) std::printf("FAIL %d x %d x %d: %s\n", s.rows, s.cols, s.depth, wrong.c_str());
      failed += !wrong.empty();
      ++n;
    }
  if (emu::stats().bank_conflicts) std::printf("FAIL the swizzle leaves bank conflicts\n"), ++failed;
  std::printf("%d of %d failed\n", failed, n);
  return failed != 0;
}
