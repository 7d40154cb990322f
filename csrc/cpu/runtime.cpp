// Scratch memory and the sharing out of work.
#include <atomic>
#include <cstdlib>
#include <new>

#include "platform.h"

namespace attn::cpu {
namespace {

constexpr size_t kAlign = 64;

struct Block {
  void* raw = nullptr;
  void* aligned = nullptr;
  size_t bytes = 0;

  ~Block() { std::free(raw); }

  void* at_least(size_t wanted) {
    if (bytes < wanted) grow(wanted);
    return aligned;
  }
  void grow(size_t wanted) {
    std::free(raw);
    raw = std::malloc(wanted + kAlign);
    bytes = raw ? wanted : 0;
    if (!raw) throw std::bad_alloc();
    aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(raw) + kAlign - 1) / kAlign * kAlign);
  }
};

thread_local Block of_units, of_calls;

// Starting the other threads takes a few microseconds: what this many multiplications take on one.
constexpr double kWorthThreads = 4e5;

struct Shared {
  std::atomic<int64_t> next{0};
  int64_t n;
  void (*body)(void*, int64_t);
  void* context;
};

void worker(void* context, int64_t, int64_t) {
  auto* shared = static_cast<Shared*>(context);
  for (int64_t i; (i = shared->next.fetch_add(1, std::memory_order_relaxed)) < shared->n;)
    shared->body(shared->context, i);
}

}  // namespace

void* scratch(size_t bytes) { return of_units.at_least(bytes); }
void* call_scratch(size_t bytes) { return of_calls.at_least(bytes); }

void run_units(int64_t n, double work, void (*body)(void*, int64_t), void* context) {
  int64_t threads = n > 1 && work > kWorthThreads ? thread_count() : 1;
  if (threads > n) threads = n;
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) body(context, i);
    return;
  }
  Shared shared;
  shared.n = n;
  shared.body = body;
  shared.context = context;
  parallel_for(threads, worker, &shared);
}

}  // namespace attn::cpu
