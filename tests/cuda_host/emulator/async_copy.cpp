// cp.async: groups of copies per thread, in order.
#include <cstring>

#include "machine.h"

namespace emu {
namespace {

void deliver(const Copy& c) {
  std::memset(shared(c.to), 0, c.bytes);
  if (c.valid) std::memcpy(shared(c.to), c.from, c.valid);
}

void land(const Copy& c) {
  if (machine.opt.async != Async::Early) deliver(c);
  end_flight(c.to, c.bytes, machine.current);
}

}  // namespace

void cp_async(uint32_t to, const void* from, uint32_t bytes, int valid_bytes, Loc loc) {
  if (valid_bytes < 0 || uint32_t(valid_bytes) > bytes)
    fail(Err::Launch, loc, "cp.async of %u bytes, %d of them valid", bytes, valid_bytes);
  if (to % bytes) fail(Err::Align, loc, "cp.async of %u bytes to shared byte %u", bytes, to - smem_base());
  if (uintptr_t(from) % bytes) fail(Err::Align, loc, "cp.async of %u bytes from %p", bytes, from);
  if (valid_bytes) check_load(from, uint32_t(valid_bytes), "cp.async", loc);
  const Copy c{to, from, bytes, uint32_t(valid_bytes)};
  begin_flight(to, bytes, machine.current, loc);
  const bool now =
      machine.opt.async == Async::Early || (machine.opt.async == Async::Random && random_number() & 1);
  if (now)
    deliver(c);  // but nobody may look before the wait
  else
    std::memset(shared(to), 0xff, bytes);
  machine.thread[machine.current].open.push_back(c);
}

void cp_async_commit(Loc) {
  Thread& t = machine.thread[machine.current];
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}

void cp_async_wait(int pending, Loc) {
  Thread& t = machine.thread[machine.current];
  while (int(t.groups.size()) > pending) {
    for (const Copy& c : t.groups.front()) land(c);
    t.groups.pop_front();
  }
}

}  // namespace emu
