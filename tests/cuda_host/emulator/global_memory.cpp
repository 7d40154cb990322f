// Global memory: which elements a kernel may load and store, and by whom they were stored.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "machine.h"

namespace emu {

bool Buffer::holds(uintptr_t address, int64_t bytes) const {
  if (address < first || address + uintptr_t(bytes) > end) return false;
  if (!nested) return true;
  const int64_t offset = int64_t(address - first);
  int64_t rest = offset / element;
  const int64_t count = (offset % element + bytes + element - 1) / element;
  for (size_t i = 0; i < dims.size(); ++i) {
    const Dim d = dims[i];
    const int64_t index = rest / d.stride;
    rest -= index * d.stride;
    const bool along = i + 1 == dims.size() && d.stride == 1;
    if (index + (along ? count : 1) > d.size) return false;
    if (along) return true;
  }
  return rest == 0 && count == 1;
}

void Memory::add(const char* label, const void* data, int64_t element_bytes, std::vector<Dim> dims,
                 Access access) {
  if (!data) return;
  Buffer b;
  b.label = label;
  b.first = uintptr_t(data);
  b.element = element_bytes;
  b.access = access;
  int64_t last = 0;
  for (const Dim& d : dims) {
    if (d.size <= 0) return;
    last += (d.size - 1) * d.stride;
    if (d.size > 1 && d.stride > 0) b.dims.push_back(d);
  }
  std::stable_sort(b.dims.begin(), b.dims.end(), [](Dim x, Dim y) { return x.stride > y.stride; });
  for (size_t i = 0; i + 1 < b.dims.size(); ++i) {
    int64_t inner = 0;
    for (size_t j = i + 1; j < b.dims.size(); ++j) inner += (b.dims[j].size - 1) * b.dims[j].stride;
    b.nested &= inner < b.dims[i].stride;
  }
  b.end = b.first + uintptr_t((last + 1) * element_bytes);
  if (access != Access::Input) b.stamps.assign(size_t(last + 1), {});
  buffers_.push_back(std::move(b));
}

Report Memory::gaps() const {
  for (const Buffer& b : buffers_) {
    if (b.access != Access::Output) continue;
    for (size_t i = 0; i < b.stamps.size(); ++i) {
      if (b.stamps[i].stored || !b.holds(b.first + i * size_t(b.element), b.element)) continue;
      return {Err::GlobalGap, std::string(name(Err::GlobalGap)) + ": element " + std::to_string(i) + " of " +
                                  b.label + " was never stored"};
    }
  }
  return {};
}

namespace {

Buffer& find(const void* p, uint32_t bytes, bool store, const char* what, Loc loc) {
  const uintptr_t a = uintptr_t(p);
  Buffer* found = nullptr;
  Buffer* nearest = nullptr;
  uintptr_t best = ~uintptr_t(0);
  static size_t last = 0;  // most accesses are to the buffer of the one before
  std::vector<Buffer>& all = machine.memory.buffers();
  if (last < all.size() && all[last].holds(a, bytes) && store == (all[last].access != Access::Input))
    return all[last];
  for (size_t i = 0; i < all.size(); ++i) {
    Buffer& b = all[i];
    if (b.holds(a, bytes)) {
      found = &b;
      last = i;
      if (store == (b.access != Access::Input)) return b;  // slices of one tensor may overlap in their bounds
    }
    const uintptr_t distance = a < b.first ? b.first - a : a + bytes > b.end ? a + bytes - b.end : 0;
    if (distance < best) {
      best = distance;
      nearest = &b;
    }
  }
  if (found) return *found;
  if (!nearest) fail(Err::GlobalBounds, loc, "%s of %u bytes, and no buffer is registered", what, bytes);
  const char* side = !best ? "in a gap of" : a < nearest->first ? "before" : "past the end of";
  fail(Err::GlobalBounds, loc, "%s of %u bytes, %zu bytes %s %s", what, bytes, size_t(best), side,
       nearest->label.c_str());
}

template <class F>
void each_stamp(Buffer& b, const void* p, uint32_t bytes, F f) {
  if (b.stamps.empty()) return;
  const size_t o = uintptr_t(p) - b.first, e = size_t(b.element);
  for (size_t i = o / e; i < (o + bytes + e - 1) / e; ++i) f(b.stamps[i], i);
}

}  // namespace

void check_load(const void* from, uint32_t bytes, const char* what, Loc loc) {
  Buffer& b = find(from, bytes, false, what, loc);
  each_stamp(b, from, bytes, [&](Buffer::Stamp& s, size_t i) {
    if (!s.stored)
      fail(Err::GlobalUninit, loc, "%s of element %zu of %s, which nobody stored", what, i, b.label.c_str());
    if (s.stored_launch == machine.launch)
      fail(Err::GlobalRace, loc, "%s of element %zu of %s, which this launch stores", what, i,
           b.label.c_str());
    s.loaded_launch = machine.launch;
  });
}

void global_read(const void* from, void* to, uint32_t bytes, Loc loc) {
  if (uintptr_t(from) % bytes) fail(Err::Align, loc, "global load of %u bytes at %p", bytes, from);
  check_load(from, bytes, "load", loc);
  std::memcpy(to, from, bytes);
}

void global_write(void* to, const void* from, uint32_t bytes, Loc loc) {
  if (uintptr_t(to) % bytes) fail(Err::Align, loc, "global store of %u bytes at %p", bytes, to);
  Buffer& b = find(to, bytes, true, "store", loc);
  if (b.access == Access::Input) fail(Err::GlobalReadOnly, loc, "store into %s", b.label.c_str());
  each_stamp(b, to, bytes, [&](Buffer::Stamp& s, size_t i) {
    const bool again = s.stored && s.stored_launch == machine.launch;
    if (again && (s.stored_block != machine.block_number || s.stored_thread != machine.current))
      fail(Err::GlobalRace, loc, "element %zu of %s is stored by another thread too", i, b.label.c_str());
    if (s.loaded_launch == machine.launch)
      fail(Err::GlobalRace, loc, "store to element %zu of %s, which this launch loads", i, b.label.c_str());
    s = {machine.launch, machine.block_number, machine.current, s.loaded_launch, true};
  });
  std::memcpy(to, from, bytes);
}

}  // namespace emu
