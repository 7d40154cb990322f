// Shared memory: bounds, and who may see what.
//
// Two accesses are ordered if a __syncthreads lies between them, or a __syncwarp where both threads are of
// one warp. Both are counted, so a cell need only keep the counts at its last write and at its reads since.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace emu {
namespace {

constexpr uint8_t kWritten = 1, kInFlight = 2;
constexpr uint16_t kNone = 0xffff, kSeveral = 0xfffe;  // as a writer, as a reader's warp
constexpr uint8_t kAllLanes = 32;

struct Range {
  Cell *first, *last;
  uint32_t offset(const Cell* c) const {
    return uint32_t(c - machine.cells.data()) * 2 - machine.opt.smem_shift;
  }
};

Range cells_at(uint32_t address, uint32_t bytes, Loc loc) {
  const uint32_t base = kSmemBase + machine.opt.smem_shift;
  if (address < base || uint64_t(address) + bytes > uint64_t(base) + machine.smem_bytes)
    fail(Err::SharedBounds, loc, "bytes [%lld, %lld) of %u of shared memory", (long long)address - base,
         (long long)address - base + bytes, machine.smem_bytes);
  Cell* cells = machine.cells.data();
  const uint32_t o = address - kSmemBase;
  return {cells + o / 2, cells + (o + bytes + 1) / 2};
}

void check_after_write(const Cell& c, uint32_t offset, uint32_t t, const char* what, Loc loc) {
  if (c.writer == kNone || c.writer == t || c.write_epoch != machine.epoch) return;
  if (c.writer / 32 == t / 32 && c.write_warp_epoch != machine.warp[t / 32].epoch) return;
  fail(Err::SharedRace, loc, "%s shared byte %u is not ordered after the write by thread %u", what, offset,
       c.writer);
}

void check_after_reads(const Cell& c, uint32_t offset, uint32_t t, Loc loc) {
  if (c.reader_warp == kNone || c.read_epoch != machine.epoch) return;
  if (c.reader_warp == t / 32) {
    if (c.read_warp_epoch != machine.warp[t / 32].epoch || c.reader_lane == t % 32) return;
    fail(Err::SharedRace, loc, "write to shared byte %u is not ordered after reads by lanes of its warp",
         offset);
  }
  if (c.reader_warp == kSeveral)
    fail(Err::SharedRace, loc, "write to shared byte %u is not ordered after the reads by several warps",
         offset);
  fail(Err::SharedRace, loc, "write to shared byte %u is not ordered after the read by warp %u", offset,
       c.reader_warp);
}

void record_read(Cell& c, uint32_t t, bool collective) {
  const uint16_t w = uint16_t(t / 32);
  const uint8_t lane = collective ? kAllLanes : uint8_t(t % 32);
  const uint32_t warp_epoch = machine.warp[w].epoch;
  if (c.reader_warp == kNone || c.read_epoch != machine.epoch) {
    c.reader_warp = w;
    c.reader_lane = lane;
  } else if (c.reader_warp != w) {
    c.reader_warp = kSeveral;
  } else if (c.read_warp_epoch != warp_epoch) {
    c.reader_lane = lane;
  } else if (c.reader_lane != lane) {
    c.reader_lane = kAllLanes;
  }
  c.read_epoch = machine.epoch;
  c.read_warp_epoch = warp_epoch;
}

void record_write(Cell& c, uint32_t t) {
  c.writer = uint16_t(t);
  c.write_epoch = machine.epoch;
  c.write_warp_epoch = machine.warp[t / 32].epoch;
}

void check_overwrite(const Range& r, const Cell* c, uint32_t t, Loc loc) {
  if (c->flags & kInFlight)
    fail(Err::SharedInFlight, loc, "write to shared byte %u while a copy into it is under way", r.offset(c));
  if (!machine.opt.race) return;
  check_after_write(*c, r.offset(c), t, "write to", loc);
  check_after_reads(*c, r.offset(c), t, loc);
}

}  // namespace

uint8_t* shared(uint32_t address) { return &machine.smem[address - kSmemBase]; }
uint32_t smem_base() { return kSmemBase + machine.opt.smem_shift; }

void reset_shared_memory() {
  const size_t bytes = size_t(machine.smem_bytes) + machine.opt.smem_shift;
  machine.smem.assign(bytes + 16, 0xff);  // NaN
  machine.cells.assign((bytes + 1) / 2 + 1, Cell{0, 0, 0, 0, kNone, kNone, 0, 0});
}

void check_read(uint32_t address, uint32_t bytes, uint32_t t, bool collective, Loc loc) {
  const Range r = cells_at(address, bytes, loc);
  for (Cell* c = r.first; c != r.last; ++c) {
    if (c->flags & kInFlight)
      fail(Err::SharedInFlight, loc, "read of shared byte %u while a copy into it is under way", r.offset(c));
    if (machine.opt.init && !(c->flags & kWritten))
      fail(Err::SharedUninit, loc, "read of shared byte %u, which nobody wrote", r.offset(c));
    if (!machine.opt.race) continue;
    check_after_write(*c, r.offset(c), t, "read of", loc);
    record_read(*c, t, collective);
  }
}

void check_write(uint32_t address, uint32_t bytes, uint32_t t, Loc loc) {
  const Range r = cells_at(address, bytes, loc);
  for (Cell* c = r.first; c != r.last; ++c) {
    check_overwrite(r, c, t, loc);
    c->flags |= kWritten;
    record_write(*c, t);
  }
}

void begin_flight(uint32_t address, uint32_t bytes, uint32_t t, Loc loc) {
  const Range r = cells_at(address, bytes, loc);
  for (Cell* c = r.first; c != r.last; ++c) {
    check_overwrite(r, c, t, loc);
    c->flags = kInFlight;
  }
}

// The bytes are the thread's own from here on; others see them after a barrier.
void end_flight(uint32_t address, uint32_t bytes, uint32_t t) {
  const Range r = cells_at(address, bytes, {"cp.async", 0});
  for (Cell* c = r.first; c != r.last; ++c) {
    c->flags = kWritten;
    record_write(*c, t);
  }
}

void shared_read(uint32_t address, void* to, uint32_t bytes, Loc loc) {
  if (address % bytes)
    fail(Err::Align, loc, "shared load of %u bytes at byte %u", bytes, address - smem_base());
  check_read(address, bytes, machine.current, false, loc);
  std::memcpy(to, shared(address), bytes);
}

void shared_write(uint32_t address, const void* from, uint32_t bytes, Loc loc) {
  if (address % bytes)
    fail(Err::Align, loc, "shared store of %u bytes at byte %u", bytes, address - smem_base());
  check_write(address, bytes, machine.current, loc);
  std::memcpy(shared(address), from, bytes);
}

}  // namespace emu
