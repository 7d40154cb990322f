// Operations of a whole warp, and the block's barrier.
#include "machine.h"

namespace emu {
namespace {

const char* name_of(Op op) {
  switch (op) {
    case Op::Mma:
      return "mma";
    case Op::Ldmatrix:
      return "ldmatrix";
    case Op::Shuffle:
      return "shfl";
    case Op::Vote:
      return "vote";
    case Op::SyncWarp:
      return "sync_warp";
    case Op::SyncThreads:
      return "sync_threads";
    case Op::None:
      break;
  }
  return "nothing";
}

bool same(Loc a, Loc b) { return a.line == b.line && std::string(a.file) == b.file; }

struct Exchange {
  uint32_t in;
  int by;
  uint32_t out;
};

template <class From>
uint32_t exchange(Op op, uint32_t v, int by, Loc loc, From from) {
  Exchange mine{v, by, 0};
  if (warp_arrive(op, &mine, loc)) {
    for (int l = 0; l < 32; ++l) arg_of_lane<Exchange>(l).out = from(l);
    release_warp();
  }
  return mine.out;
}

void release_block() {
  ++machine.epoch;
  machine.warps_waiting = 0;
  for (Warp& w : machine.warp) {
    w.arrived = 0;
    w.runnable = ~0u;
  }
  for (Thread& t : machine.thread) t.why = Why::Runs;
}

}  // namespace

bool warp_arrive(Op op, void* arg, Loc loc) {
  Warp& w = machine.my_warp();
  if (w.exited) fail(Err::Collective, loc, "%s in a warp with lanes that have exited", name_of(op));
  if (!w.arrived) {
    w.op = op;
    w.loc = loc;
  } else if (w.op != op || !same(w.loc, loc)) {
    fail(Err::Collective, loc, "the warp has diverged: this lane is at %s, others at %s (line %d)",
         name_of(op), name_of(w.op), w.loc.line);
  }
  w.arrived |= 1u << machine.lane();
  w.args[machine.lane()] = arg;
  if (w.arrived == ~0u) return true;
  wait_here(Why::Warp, loc);
  return false;
}

void release_warp() {
  Warp& w = machine.my_warp();
  w.arrived = 0;
  w.runnable = ~0u;
  for (uint32_t l = 0; l < 32; ++l) machine.thread[(machine.current & ~31u) + l].why = Why::Runs;
}

uint32_t shfl_xor(uint32_t v, int mask, Loc loc) {
  return exchange(Op::Shuffle, v, mask, loc,
                  [&](int l) { return arg_of_lane<Exchange>((l ^ arg_of_lane<Exchange>(l).by) & 31).in; });
}

uint32_t shfl_idx(uint32_t v, int from, Loc loc) {
  return exchange(Op::Shuffle, v, from, loc,
                  [&](int l) { return arg_of_lane<Exchange>(arg_of_lane<Exchange>(l).by & 31).in; });
}

bool vote_any(bool v, Loc loc) {
  return exchange(Op::Vote, v, 0, loc, [&](int) {
    uint32_t any = 0;
    for (int l = 0; l < 32; ++l) any |= arg_of_lane<Exchange>(l).in;
    return any;
  });
}

void sync_warp(Loc loc) {
  if (!warp_arrive(Op::SyncWarp, nullptr, loc)) return;
  ++machine.my_warp().epoch;
  release_warp();
}

void sync_threads(Loc loc) {
  if (!warp_arrive(Op::SyncThreads, nullptr, loc)) return;  // waits on with its warp
  if (machine.warps_waiting == 0)
    machine.barrier = loc;
  else if (!same(machine.barrier, loc))
    fail(Err::Collective, loc, "warps wait for the block at different barriers, others at line %d",
         machine.barrier.line);
  if (++machine.warps_waiting == machine.warps)
    release_block();
  else
    wait_here(Why::Block, loc);
}

uint32_t tid() { return machine.current; }
Dim3 block_index() { return machine.block; }

}  // namespace emu
