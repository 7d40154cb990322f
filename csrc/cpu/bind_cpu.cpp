// The ops `attn_cpu::*`: those of csrc/bind_ops.h, and short ones for small calls.
#include "../bind_ops.h"
#include "kernels.h"

namespace attn::cpu {

void parallel_for(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
  if (n <= 1) {
    if (n == 1) body(context, 0, 1);
    return;
  }
  struct Work {
    void (*body)(void*, int64_t, int64_t);
    void* context;
  } work{body, context};
  const auto part = [](int64_t begin, int64_t end, void* w) {
    const auto* work = static_cast<const Work*>(w);
    work->body(work->context, begin, end);
  };
  stable::must(torch_parallel_for(0, n, 1, part, &work));
}

int thread_count() {
  uint32_t n = 1;
  stable::must(torch_get_num_threads(&n));
  return static_cast<int>(n);
}

namespace {

using bind::Call;
using stable::Device;
using stable::Tensor;

std::atomic<const Kernels*> selected{nullptr};

struct Engine {
  static constexpr const char* kLibrary = "attn_cpu";
  static constexpr bool kReadsValues = true, kWeightsFromResiduals = false;

  static void forward(const Problem& p, const Weights* w, Device) { active().forward(p, w); }
  static void weights(const Problem& p, const Weights& w, Device) { active().weights(p, w); }
  static void backward(const Problem& p, const Backward& b, Device) { active().backward(p, b); }
  static void decode(const Decode& d, Device) { active().decode(d); }
  static void fill(void* data, int byte, int64_t bytes, Device) {
    std::memset(data, byte, static_cast<size_t>(bytes));
  }

 private:
  static const Kernels& active() {
    const Kernels* set = selected.load(std::memory_order_relaxed);
    stable::require(set != nullptr, kLibrary,
                    ": no instruction set is selected; call the ops through attn.native");
    return *set;
  }
};

using Ops = bind::Ops<Engine>;

// A call of three tensors without residuals: the fewest arguments and results.
void infer(uint64_t* s, uint64_t given, uint64_t taken) {
  Ops::require_words(given, Call::kPlainWords, taken, 1);
  Call c(Engine::kReadsValues);
  c.own_plain(s);
  c.read_plain(s);
  s[0] = Ops::run_forward(c, bind::kNone, false).out.release();
}

void infer_weights(uint64_t* s, uint64_t given, uint64_t taken) {
  Ops::require_words(given, Call::kPlainWords + 1, taken, 2);
  Call c(Engine::kReadsValues);
  c.own_plain(s);
  c.read_plain(s);
  bind::Results r = Ops::run_forward(c, stable::integer(s[Call::kPlainWords]), false);
  s[0] = r.out.release();
  s[1] = r.weights.release();
}

void plain(uint64_t* s, uint64_t given, uint64_t taken) {
  Ops::require_words(given, Call::kPlainWords + 1, taken, 4);
  Call c(Engine::kReadsValues);
  c.own_plain(s);
  c.read_plain(s);
  Ops::run_forward(c, stable::integer(s[Call::kPlainWords]), true).release(s);
}

void plain_backward(uint64_t* s, uint64_t given, uint64_t taken) {
  Ops::require_words(given, Call::kPlainWords + 4, taken, 4);
  bind::Incoming in{Tensor::input(s[0]), Tensor(), Tensor(), Tensor::input(s[1]), Tensor::input(s[2]),
                    Tensor::input(s[3]), {}};
  Call c(Engine::kReadsValues);
  c.own_plain(s + 4);
  c.read_plain(s + 4);
  Ops::backward_into(s, c, in, false);
}

struct Registered {
  Registered() : registration("attn_cpu", "CPU") {
    Ops::add(registration);
    registration.add("infer", infer)
        .add("infer_weights", infer_weights)
        .add("plain", plain)
        .add("plain_backward", plain_backward);
  }
  stable::Registration registration;
};
const Registered registered;

}  // namespace
}  // namespace attn::cpu

// The instruction set that runs from now on, null: the best of this CPU. Returns its name; null where it
// cannot run here, and then nothing changes.
ATTN_EXPORT const char* attn_cpu_select(const char* isa) {
  const attn::cpu::Kernels* found = attn::cpu::kernels(isa);
  if (found == nullptr) return nullptr;
  attn::cpu::selected.store(found, std::memory_order_relaxed);
  return found->isa;
}

// See Ops::poison in csrc/bind_ops.h.
ATTN_EXPORT void attn_cpu_poison(int on) { attn::cpu::Ops::poison(on != 0); }

// Floating-point operations done in `rounds` of nothing but multiply-adds, for the peak that benchmarks
// measure; of `pairs` of bf16 0.0 where the set has no such.
ATTN_EXPORT double attn_cpu_multiply_adds(int64_t rounds, bool pairs) {
  const attn::cpu::Kernels* set = attn::cpu::selected.load(std::memory_order_relaxed);
  if (set == nullptr) return 0.0;
  const auto run = pairs ? set->pair_products : set->multiply_adds;
  return run == nullptr ? 0.0 : run(rounds);
}
