#include "fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emu {

// ---- Stacks and switches

char* stack_of(size_t index) {
  static std::vector<char*> stacks;
  constexpr size_t kGuard = 4096;
  while (stacks.size() <= index) {
    void* p = mmap(nullptr, kStackBytes + kGuard, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, kGuard, PROT_NONE) != 0) std::abort();
    stacks.push_back(static_cast<char*>(p) + kGuard);
  }
  return stacks[index];
}

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
extern "C" void emu_switch(void** save, void* load);
asm(R"(
.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch,.-emu_switch
)");
#endif

void prepare(Context& c, char* stack, void (*start)()) {
  constexpr size_t kPoisoned = 16 * 1024;  // what the locals of a kernel take
  c.stack = stack;
  c.sanitizer = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, kStackBytes);
#endif
  std::memset(stack + kStackBytes - kPoisoned, 0xff, kPoisoned);
#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // so that the stack pointer is 8 modulo 16 in `start`, as after a call
  *--top = reinterpret_cast<void*>(start);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the saved registers
  c.stack_pointer = top;
#else
  getcontext(&c.u);
  c.u.uc_stack.ss_sp = stack;
  c.u.uc_stack.ss_size = kStackBytes;
  c.u.uc_link = nullptr;
  makecontext(&c.u, start, 0);
#endif
}

#if defined(__SANITIZE_ADDRESS__)
namespace {
const void* process_stack = nullptr;
size_t process_stack_size = 0;
}  // namespace
#endif

void entered() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!process_stack) {  // the first switch of all comes from there
    process_stack = bottom;
    process_stack_size = size;
  }
#endif
}

void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.sanitizer, to.stack ? to.stack : process_stack,
                                 to.stack ? kStackBytes : process_stack_size);
#endif
#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
  emu_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.u, &to.u);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.sanitizer, nullptr, nullptr);
#endif
}

// ---- The scheduler

namespace {

Context scheduler;

Context& context_of(uint32_t thread) {
  return thread == Machine::kNobody ? scheduler : machine.thread[thread].context;
}

void switch_to(uint32_t thread) {
  Context& from = context_of(machine.current);
  machine.current = thread;
  switch_context(from, context_of(thread));
}

// The next thread of the same warp, else of another; kNobody where all wait.
uint32_t next_thread() {
  const Warp& w = machine.warp[machine.current_warp];
  if (w.runnable) {
    const uint32_t lane = machine.current == Machine::kNobody ? 31 : machine.lane();
    const uint32_t above = lane == 31 ? 0 : w.runnable & (~0u << (lane + 1));
    return machine.current_warp * 32 + uint32_t(__builtin_ctz(above ? above : w.runnable));
  }
  const uint32_t start =
      machine.opt.seed ? uint32_t(random_number() % machine.warps) : machine.current_warp + 1;
  for (uint32_t i = 0; i < machine.warps; ++i) {
    const uint32_t k = (start + i) % machine.warps;
    if (!machine.warp[k].runnable) continue;
    machine.current_warp = k;
    return k * 32 + uint32_t(__builtin_ctz(machine.warp[k].runnable));
  }
  return Machine::kNobody;
}

void thread_main() {
  entered();
  (*machine.kernel)();
  Thread& t = machine.thread[machine.current];
  bool copying = !t.open.empty();
  for (const std::vector<Copy>& group : t.groups) copying |= !group.empty();
  if (copying) fail(Err::AsyncLeak, {"kernel end", 0}, "the thread exits with cp.async under way");
  t.why = Why::Exited;
  Warp& w = machine.my_warp();
  w.runnable &= ~(1u << machine.lane());
  w.exited |= 1u << machine.lane();
  ++machine.exited;
  switch_to(next_thread());
  std::abort();
}

std::string place(Loc loc) {
  const char* slash = std::strrchr(loc.file, '/');
  return std::string(slash ? slash + 1 : loc.file) + ":" + std::to_string(loc.line);
}

std::string who_waits() {
  std::map<std::string, int> counts;
  for (const Thread& t : machine.thread) {
    if (t.why == Why::Exited) ++counts["exited"];
    if (t.why == Why::Warp) ++counts["wait for their warp at " + place(t.loc)];
    if (t.why == Why::Block) ++counts["wait for the block at " + place(t.loc)];
  }
  std::string text;
  for (const auto& [what, n] : counts) text += (text.empty() ? "" : ", ") + std::to_string(n) + " " + what;
  return text;
}

}  // namespace

uint64_t random_number() {
  uint64_t& r = machine.random;
  r ^= r << 13;
  r ^= r >> 7;
  r ^= r << 17;
  return r;
}

void fail(Err err, Loc loc, const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  const Dim3 b = machine.block;
  char where[128];
  snprintf(where, sizeof where, " block (%d,%d,%d) thread %d: ", int(b.x), int(b.y), int(b.z),
           machine.current == Machine::kNobody ? -1 : int(machine.current));
  machine.report = {err, std::string(name(err)) + " at " + place(loc) + where + text};
  if (machine.current != Machine::kNobody) switch_to(Machine::kNobody);  // never resumed
  throw Stop{};
}

void wait_here(Why why, Loc loc) {
  Thread& t = machine.thread[machine.current];
  t.why = why;
  t.loc = loc;
  machine.my_warp().runnable &= ~(1u << machine.lane());
  const uint32_t next = next_thread();
  if (next != machine.current) switch_to(next);
}

void run_threads() {
  for (uint32_t t = 0; t < machine.threads; ++t) prepare(machine.thread[t].context, stack_of(t), thread_main);
  machine.current = Machine::kNobody;
  for (uint32_t next; (next = next_thread()) != Machine::kNobody;) {
    switch_to(next);
    if (!machine.report.ok()) throw Stop{};
  }
  if (machine.exited != machine.threads) fail(Err::Deadlock, {"scheduler", 0}, "%s", who_waits().c_str());
}

}  // namespace emu
