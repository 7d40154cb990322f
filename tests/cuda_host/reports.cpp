// Every report of the emulator: a small kernel that earns it, and its neighbour that does not.
#include <cstdio>
#include <set>

#include "../../csrc/cuda/prim.cuh"
#include "emulator/emulator.h"

using namespace attn::cuda::prim;
using emu::Access;
using emu::Err;

namespace {

constexpr int kElements = 1022;
alignas(16) uint16_t input[kElements + 2];  // two more than the kernels are told of
float output[64];
uint32_t scratch[64];

struct Setting {
  int threads = 64, smem_bytes = 4096;
  emu::Dim3 grid = {};
  emu::Options options = {};
};

int failed = 0;
std::set<Err> seen;

template <class F>
void expect(Err wanted, const char* what, F kernel, const Setting& setting = {}) {
  emu::Memory& memory = emu::memory();
  memory.clear();
  memory.add("input", input, 2, {{kElements, 1}}, Access::Input);
  memory.add("output", output, 4, {{8, 8}, {4, 1}}, Access::Output);  // four of every eight
  memory.add("scratch", scratch, 4, {{64, 1}}, Access::Scratch);
  emu::options() = setting.options;
  const emu::Report r =
      emu::launch(setting.grid, setting.threads, setting.smem_bytes, [&] { kernel(smem_base()); });
  const bool ok = r.err == wanted;
  failed += !ok;
  seen.insert(r.err);
  std::printf("%-4s %-64s %s\n", ok ? "ok" : "FAIL", what, r.ok() ? "clean" : r.message.c_str());
}

void put(uint32_t address, uint32_t value) { sts<uint32_t>(address, value); }

void barriers() {
  expect(Err::None, "an exchange over the block's barrier", [](uint32_t s) {
    put(s + tid() * 4, tid());
    sync_threads();
    lds<uint32_t>(s + (63 - tid()) * 4);
  });
  expect(Err::SharedRace, "the same without it", [](uint32_t s) {
    put(s + tid() * 4, tid());
    if (tid() == 40) lds<uint32_t>(s);
  });
  expect(Err::None, "an exchange within a warp over its barrier", [](uint32_t s) {
    put(s + tid() * 4, tid());
    sync_warp();
    lds<uint32_t>(s + (tid() ^ 1) * 4);
  });
  expect(Err::SharedRace, "a shuffle is no barrier", [](uint32_t s) {
    put(s + tid() * 4, tid());
    shfl_xor(1.f, 1);
    if (tid() == 5) lds<uint32_t>(s);
  });
  expect(Err::SharedRace, "a warp's barrier is none for another warp", [](uint32_t s) {
    put(s + tid() * 4, tid());
    sync_warp();
    if (tid() == 40) lds<uint32_t>(s);
  });
  expect(Err::SharedRace, "a store after another warp's load", [](uint32_t s) {
    if (tid() < 32) put(s + tid() * 4, 0);
    sync_threads();
    if (tid() == 3) lds<uint32_t>(s);
    if (tid() == 63) put(s, 1);
  });
  expect(Err::SharedRace, "a store after loads by two warps, its own among them", [](uint32_t s) {
    if (tid() == 0) put(s, 0);
    sync_threads();
    lds<uint32_t>(s);
    sync_warp();
    if (tid() == 63) put(s, 1);
  });
  expect(Err::SharedRace, "a store after another lane's load", [](uint32_t s) {
    if (tid() == 0) put(s, 0);
    sync_threads();
    if (tid() == 1) lds<uint32_t>(s);
    if (tid() == 2) put(s, 1);
  });
  expect(Err::None, "a store after one's own load", [](uint32_t s) {
    if (tid() == 1) put(s, 0);
    if (tid() == 1) lds<uint32_t>(s);
    if (tid() == 1) put(s, 1);
  });
  expect(Err::SharedRace, "two stores to one place", [](uint32_t s) { put(s, tid()); });
  expect(Err::SharedRace, "ldmatrix, then a store by a lane of the warp", [](uint32_t s) {
    uint32_t r[4];
    sts<u32x4>(s + tid() * 16, u32x4{});
    sync_threads();
    ldmatrix_x4(r, s + lane() * 16);
    if (tid() == 9) put(s, 1);
  });
  expect(Err::None, "with a warp's barrier between them", [](uint32_t s) {
    uint32_t r[4];
    sts<u32x4>(s + tid() * 16, u32x4{});
    sync_threads();
    ldmatrix_x4(r, s + tid() * 16);
    sync_warp();
    put(s + tid() * 16, 1);
  });
}

void bounds() {
  expect(Err::SharedUninit, "shared memory that nobody wrote", [](uint32_t s) { lds<uint32_t>(s); });
  expect(Err::SharedUninit, "half of a load that nobody wrote", [](uint32_t s) {
    sts<uint16_t>(s + tid() * 4, uint16_t(1));
    lds<uint32_t>(s + tid() * 4);
  });
  expect(Err::SharedBounds, "past the end of shared memory", [](uint32_t s) { put(s + 4096, 0); });
  expect(Err::SharedBounds, "before shared memory", [](uint32_t) { put(0, 0); });
  Setting shifted;
  shifted.options.smem_shift = 256;
  expect(Err::SharedBounds, "before shared memory, moved", [](uint32_t s) { put(s - 4, 0); }, shifted);
  expect(Err::Align, "a shared load off its alignment", [](uint32_t s) { lds<u32x2>(s + 4); });
  expect(Err::Align, "an ldmatrix row off its alignment", [](uint32_t s) {
    uint32_t r[4];
    ldmatrix_x4(r, s + 4);
  });
  expect(Err::Align, "a copy to where it may not go", [](uint32_t s) { cp_async_16(s + 8, input, 16); });
  expect(Err::Align, "a copy from where it may not come", [](uint32_t s) { cp_async_8(s, input + 1, 8); });
  expect(Err::Align, "a global load off its alignment",
         [](uint32_t) { ldg(reinterpret_cast<const uint32_t*>(input + 1)); });
  expect(Err::GlobalBounds, "past the end of a tensor", [](uint32_t) { ldg(input + kElements); });
  expect(Err::GlobalBounds, "a copy past the end of a tensor",
         [](uint32_t s) { cp_async_8(s + tid() * 8, input + kElements - 2, 8); });
  expect(Err::None, "the same copy with what is there marked as valid", [](uint32_t s) {
    cp_async_8(s + tid() * 8, input + kElements - 2, 4);
    cp_async_commit();
    cp_async_wait<0>();
  });
  expect(Err::GlobalBounds, "a store between the rows of a strided tensor", [](uint32_t) {
    if (tid() == 0) stg(output + 4, 0.f);
  });
  expect(Err::GlobalBounds, "a wide store over the end of a row", [](uint32_t) {
    if (tid() == 0) stg(reinterpret_cast<u32x2*>(output + 10), u32x2{});
    if (tid() == 0) stg(reinterpret_cast<u32x4*>(output + 14 - 2), u32x4{});
  });
  expect(Err::GlobalReadOnly, "a store into an input", [](uint32_t) { stg(input, uint16_t(0)); });
}

void global_order() {
  expect(Err::GlobalRace, "one element stored by two threads", [](uint32_t) { stg(output, 1.f); });
  Setting two_blocks;
  two_blocks.grid = {2, 1, 1};
  expect(
      Err::GlobalRace, "one element stored by two blocks",
      [](uint32_t) {
        if (tid() == 0) stg(output, 1.f);
      },
      two_blocks);
  expect(
      Err::GlobalRace, "a block loads what another stored",
      [](uint32_t) {
        if (tid() == 0 && bid_x() == 0) stg(scratch, 1u);
        if (tid() == 0 && bid_x() == 1) ldg(scratch);
      },
      two_blocks);
  expect(Err::GlobalUninit, "scratch that nobody stored", [](uint32_t) { ldg(scratch); });
}

void collectives() {
  expect(Err::Collective, "half of a warp elsewhere", [](uint32_t) {
    if (lane() < 16)
      shfl_xor(1.f, 1);
    else
      sync_warp();
  });
  expect(Err::Collective, "the same operation on two lines", [](uint32_t) {
    if (lane() < 16)
      vote_any(true);
    else
      vote_any(false);
  });
  expect(Err::Collective, "lanes that have exited", [](uint32_t) {
    if (lane() == 0) return;
    sync_warp();
  });
  expect(Err::Collective, "warps at two barriers of the block", [](uint32_t) {
    if (tid() < 32)
      sync_threads();
    else
      sync_threads();
  });
  expect(Err::Deadlock, "a warp that skips the barrier", [](uint32_t) {
    if (tid() < 32) sync_threads();
  });
}

void copies() {
  const auto start = [](uint32_t s) {
    cp_async_16(s + tid() * 16, input, 16);
    cp_async_commit();
  };
  expect(Err::None, "a copy, waited for", [=](uint32_t s) {
    start(s);
    cp_async_wait<0>();
    lds<u32x4>(s + tid() * 16);
  });
  expect(Err::AsyncLeak, "the end with a copy under way", start);
  expect(Err::AsyncLeak, "the end with a copy in no group",
         [](uint32_t s) { cp_async_4(s + tid() * 4, input, 4); });
  expect(Err::None, "the end with an empty group", [](uint32_t) { cp_async_commit(); });
  for (emu::Async mode : {emu::Async::Late, emu::Async::Early, emu::Async::Random}) {
    Setting setting;
    setting.options.async = mode;
    expect(
        Err::SharedInFlight, "a load before the wait",
        [=](uint32_t s) {
          start(s);
          lds<u32x4>(s + tid() * 16);
        },
        setting);
  }
  expect(Err::SharedInFlight, "a wait for one group too few", [=](uint32_t s) {
    start(s);
    cp_async_wait<1>();
    lds<u32x4>(s + tid() * 16);
  });
  expect(Err::SharedInFlight, "a store over a copy under way", [=](uint32_t s) {
    start(s);
    put(s + tid() * 16, 0);
  });
  expect(Err::SharedInFlight, "another thread's copy, which it has not waited for", [=](uint32_t s) {
    start(s);
    sync_threads();
    lds<u32x4>(s + (63 - tid()) * 16);
  });
  expect(Err::SharedRace, "another thread's copy after its wait, before the barrier", [=](uint32_t s) {
    start(s);
    cp_async_wait<0>();
    shfl_xor(1.f, 1);
    lds<u32x4>(s + (tid() ^ 1) * 16);
  });
  expect(Err::None, "another thread's copy after both", [=](uint32_t s) {
    start(s);
    cp_async_wait<0>();
    sync_threads();
    lds<u32x4>(s + (63 - tid()) * 16);
  });
  expect(Err::SharedRace, "a copy over what another warp still reads", [=](uint32_t s) {
    start(s);
    cp_async_wait<0>();
    sync_threads();
    lds<u32x4>(s + (63 - tid()) * 16);
    start(s);
    cp_async_wait<0>();
  });
}

void launches() {
  const auto nothing = [](uint32_t) {};
  expect(Err::Launch, "a copy with more valid bytes than bytes", [](uint32_t s) { cp_async_4(s, input, 8); });
  expect(Err::Launch, "48 threads", nothing, {48, 0});
  expect(Err::Launch, "2048 threads", nothing, {2048, 0});
  expect(Err::Launch, "more shared memory than an SM has", nothing, {64, 300 * 1024});
  expect(Err::Launch, "65536 blocks along y", nothing, {64, 0, {1, 65536, 1}});
  expect(Err::None, "no blocks at all", nothing, {64, 0, {0, 1, 1}});
}

// Rows of four elements, eight apart.
void gaps() {
  const auto store_below = [](uint32_t end) {
    return [=](uint32_t) {
      if (tid() < end && tid() % 8 < 4) stg(output + tid(), 0.f);
    };
  };
  const auto expect_gap = [](Err wanted) {
    const emu::Report r = emu::memory().gaps();
    failed += r.err != wanted;
    seen.insert(r.err);
    std::printf("%-4s %-64s %s\n", r.err == wanted ? "ok" : "FAIL", "", r.message.c_str());
  };
  expect(Err::None, "an output stored in full", store_below(60));
  expect_gap(Err::None);
  expect(Err::None, "an output without its last element", store_below(59));
  expect_gap(Err::GlobalGap);
}

}  // namespace

int main() {
  barriers();
  bounds();
  global_order();
  collectives();
  copies();
  launches();
  gaps();
  for (int e = 0; e <= int(Err::Launch); ++e)
    if (!seen.count(Err(e))) {
      std::printf("FAIL no case for %s\n", emu::name(Err(e)));
      ++failed;
    }
  std::printf("%d failed\n", failed);
  return failed != 0;
}
