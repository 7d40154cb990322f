// A stack of its own for every CUDA thread, and the switch between two of them.
#pragma once
#include <cstddef>

#if !defined(__x86_64__) || defined(EMU_UCONTEXT)
#include <ucontext.h>
#endif

namespace emu {

struct Context {
#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
  void* stack_pointer = nullptr;
#else
  ucontext_t u;
#endif
  char* stack = nullptr;      // null: the stack of the process
  void* sanitizer = nullptr;  // what the address sanitizer keeps for a stack that does not run
};

constexpr size_t kStackBytes = 256 * 1024;

// A stack with a guard page below; the same for the same index.
char* stack_of(size_t index);
// The next switch to `c` enters `start`, which never returns. Fresh locals hold NaN.
void prepare(Context& c, char* stack, void (*start)());
void switch_context(Context& from, Context& to);
void entered();  // first thing on a new stack

}  // namespace emu
