// The state of the block that runs: shared by the parts of the emulator, seen by nobody else.
#pragma once
#include <deque>
#include <vector>

#include "emulator.h"
#include "fibers.h"

namespace emu {

constexpr uint32_t kSmemBase = 1024;  // not 0: code may not rely on that
constexpr uint32_t kMaxThreads = 1024;

enum class Why : uint8_t { Runs, Warp, Block, Exited };
enum class Op : uint8_t { None, Mma, Ldmatrix, Shuffle, Vote, SyncWarp, SyncThreads };

struct Copy {
  uint32_t to;
  const void* from;
  uint32_t bytes, valid;
};

struct Thread {
  Context context;
  Why why = Why::Runs;
  Loc loc{"", 0};
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  uint32_t runnable = 0, arrived = 0, exited = 0;  // a bit per lane
  uint32_t epoch = 0;                              // counts __syncwarp
  Op op = Op::None;
  Loc loc{"", 0};
  void* args[32] = {};
};

// Two bytes of shared memory.
struct Cell {
  uint32_t write_epoch, write_warp_epoch, read_epoch, read_warp_epoch;
  uint16_t writer, reader_warp;
  uint8_t reader_lane, flags;
};

struct Machine {
  Options opt;
  Stats stats;
  Memory memory;
  Report report;
  const std::function<void()>* kernel = nullptr;
  Dim3 grid, block;
  uint32_t launch = 0, block_number = 0, threads = 0, warps = 0, smem_bytes = 0;
  std::vector<uint8_t> smem;
  std::vector<Cell> cells;
  std::vector<Thread> thread;
  std::vector<Warp> warp;
  uint32_t epoch = 0;          // counts __syncthreads
  uint32_t warps_waiting = 0;  // at the block's barrier
  Loc barrier{"", 0};
  uint32_t current = kNobody, current_warp = 0, exited = 0;
  uint64_t random = 0;
  static constexpr uint32_t kNobody = UINT32_MAX;  // the scheduler itself

  uint32_t lane() const { return current & 31; }
  Warp& my_warp() { return warp[current / 32]; }
};
extern Machine machine;

// ---- fibers.cpp
struct Stop {};  // thrown to leave a launch
[[noreturn]] __attribute__((format(printf, 3, 4))) void fail(Err, Loc, const char* format, ...);
void wait_here(Why, Loc);
void run_threads();  // of one block, until none can run
uint64_t random_number();

// ---- shared_memory.cpp
uint8_t* shared(uint32_t address);
void reset_shared_memory();
// `collective`: the value goes to all lanes, whoever gave the address.
void check_read(uint32_t address, uint32_t bytes, uint32_t by_thread, bool collective, Loc);
void check_write(uint32_t address, uint32_t bytes, uint32_t by_thread, Loc);
void begin_flight(uint32_t address, uint32_t bytes, uint32_t by_thread, Loc);
void end_flight(uint32_t address, uint32_t bytes, uint32_t by_thread);

// ---- global_memory.cpp
void check_load(const void* from, uint32_t bytes, const char* what, Loc);

// ---- warps.cpp
// True in exactly one lane, which does the work of all and then calls release_warp().
bool warp_arrive(Op, void* arg, Loc);
void release_warp();
template <class Arg>
Arg& arg_of_lane(int lane) {
  return *static_cast<Arg*>(machine.my_warp().args[lane]);
}
template <class Arg>
bool warp_arrive_with(Op op, Arg& arg, Loc loc) {
  return warp_arrive(op, &arg, loc);
}

}  // namespace emu
