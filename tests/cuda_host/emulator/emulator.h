// Runs the blocks of a CUDA kernel on the CPU, and stops at the first thing a GPU would not forgive.
//
// One block at a time, one fiber per thread. Operations of a warp or of the block are rendezvous points.
// Asynchronous copies arrive as late as the rules allow (or as early, or at random), and hold NaN until then.
// Every 2 bytes of shared memory know who wrote and who read them last, so that a missing barrier is reported
// even where the data happens to come out right.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "device.h"

namespace emu {

enum class Err {
  None,
  SharedRace,      // two unordered accesses, at least one of them a write
  SharedUninit,    // a read of shared bytes that nobody wrote
  SharedBounds,    // outside the block's shared memory
  SharedInFlight,  // touches bytes that an asynchronous copy still owns
  Align,           // an address that is no multiple of the access's size
  GlobalBounds,    // an element of no registered buffer
  GlobalReadOnly,  // a store into an input
  GlobalRace,      // an element stored by two threads, or stored and loaded, within one launch
  GlobalUninit,    // a load from an output or from scratch that nobody stored
  GlobalGap,       // an element of an output that was never stored
  Collective,      // lanes of a warp, or warps of the block, disagree about an operation
  Deadlock,        // nothing can run
  AsyncLeak,       // the kernel ended with copies under way
  Launch,          // a grid, block or amount of shared memory that no GPU takes
};
const char* name(Err);

enum class Async { Late, Early, Random };

struct Options {
  Async async = Async::Late;
  uint64_t seed = 0;        // 0: warps run in order; else in random order
  bool race = true;         // look for unordered accesses
  bool init = true;         // look for reads of what nobody wrote
  uint32_t smem_shift = 0;  // moves shared memory by a multiple of 128 bytes
};
// What `launch` uses. Starts from the environment: ATTN_EMU_ASYNC (late, early, random), ATTN_EMU_SEED,
// ATTN_EMU_CHECKS (0: neither race nor init).
Options& options();

struct Stats {
  uint64_t launches = 0, mma = 0;
  uint64_t bank_conflicts = 0;  // passes of ldmatrix beyond one per 8x8 matrix
};
Stats& stats();

struct Report {
  Err err = Err::None;
  std::string message;  // "" where all is well
  bool ok() const { return err == Err::None; }
};

// ---- Global memory: what kernels may touch

enum class Access {
  Input,    // loads
  Output,   // stores, each element by one thread of a launch; every element is expected to be stored
  Scratch,  // stores, and loads in later launches
};

struct Dim {
  int64_t size, stride;  // stride in elements
};

struct Buffer {
  std::string label;
  uintptr_t first = 0, end = 0;
  int64_t element = 1;    // bytes
  std::vector<Dim> dims;  // by falling stride, none of size 1 or stride 0
  bool nested = true;     // the strides tell elements apart, so that gaps between rows are out of bounds
  Access access = Access::Input;
  struct Stamp {
    uint32_t stored_launch = 0, stored_block = 0, stored_thread = 0, loaded_launch = 0;
    bool stored = false;
  };
  std::vector<Stamp> stamps;  // one per element, outputs and scratch only
  bool holds(uintptr_t address, int64_t bytes) const;
};

class Memory {
 public:
  // A null pointer or no elements at all adds nothing.
  void add(const char* label, const void* data, int64_t element_bytes, std::vector<Dim> dims, Access access);
  void clear() { buffers_.clear(); }
  Report gaps() const;  // outputs with elements that nobody stored
  std::vector<Buffer>& buffers() { return buffers_; }

 private:
  std::vector<Buffer> buffers_;
};
Memory& memory();

// ---- Launching

Report launch(Dim3 grid, int threads, int smem_bytes, const std::function<void()>& kernel);

}  // namespace emu
