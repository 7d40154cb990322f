// A grid: its limits, and its blocks one after another.
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "machine.h"

namespace emu {

Machine machine;

const char* name(Err e) {
  static const char* names[] = {"None",           "SharedRace",   "SharedUninit", "SharedBounds",
                                "SharedInFlight", "Align",        "GlobalBounds", "GlobalReadOnly",
                                "GlobalRace",     "GlobalUninit", "GlobalGap",    "Collective",
                                "Deadlock",       "AsyncLeak",    "Launch"};
  return names[int(e)];
}

namespace {

Options from_environment() {
  Options o;
  if (const char* a = std::getenv("ATTN_EMU_ASYNC"))
    o.async = !std::strcmp(a, "early")    ? Async::Early
              : !std::strcmp(a, "random") ? Async::Random
                                          : Async::Late;
  if (const char* s = std::getenv("ATTN_EMU_SEED")) o.seed = std::strtoull(s, nullptr, 10);
  if (const char* c = std::getenv("ATTN_EMU_CHECKS")) o.race = o.init = std::strcmp(c, "0") != 0;
  return o;
}

void check_limits(Dim3 grid, int threads, int smem_bytes) {
  constexpr int kSmemLimit = 227 * 1024;  // of sm_90; sm_80 has 163 KB, sm_86 99
  const Loc here{"launch", 0};
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || grid.x < 0 || grid.y < 0 || grid.z < 0)
    fail(Err::Launch, here, "grid (%lld, %lld, %lld)", (long long)grid.x, (long long)grid.y,
         (long long)grid.z);
  if (threads % 32 || threads < 32 || threads > int(kMaxThreads))
    fail(Err::Launch, here, "%d threads", threads);
  if (smem_bytes < 0 || smem_bytes > kSmemLimit)
    fail(Err::Launch, here, "%d bytes of shared memory", smem_bytes);
}

void run_block() {
  reset_shared_memory();
  machine.thread.assign(machine.threads, Thread{});
  machine.warp.assign(machine.warps, Warp{});
  for (Warp& w : machine.warp) w.runnable = ~0u;
  machine.epoch = machine.warps_waiting = machine.exited = machine.current_warp = 0;
  run_threads();
}

}  // namespace

Options& options() {
  static Options o = from_environment();
  return o;
}
Stats& stats() { return machine.stats; }
Memory& memory() { return machine.memory; }

Report launch(Dim3 grid, int threads, int smem_bytes, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  machine.opt = options();
  machine.random = machine.opt.seed * 0x9E3779B97F4A7C15ull + 1;
  machine.report = {};
  machine.kernel = &kernel;
  machine.grid = grid;
  machine.current = Machine::kNobody;
  machine.block = {0, 0, 0};
  machine.block_number = 0;
  ++machine.launch;
  ++machine.stats.launches;
  try {
    check_limits(grid, threads, smem_bytes);
    machine.threads = uint32_t(threads);
    machine.warps = machine.threads / 32;
    machine.smem_bytes = uint32_t(smem_bytes);
    for (int64_t z = 0; z < grid.z; ++z)
      for (int64_t y = 0; y < grid.y; ++y)
        for (int64_t x = 0; x < grid.x; ++x, ++machine.block_number) {
          machine.block = {x, y, z};
          run_block();
        }
  } catch (const Stop&) {
  }
  return machine.report;
}

const char* run(Dim3 grid, int threads, int smem_bytes, void (*kernel)(const void*), const void* params) {
  static std::string message;
  message = launch(grid, threads, smem_bytes, [=] { kernel(params); }).message;
  return message.c_str();
}

}  // namespace emu
