// What tests set and ask of the emulator inside the emulated library; control.py calls it.
#include "emulator/emulator.h"

extern "C" {

void attn_emu_set(int async, uint64_t seed, int checks, uint32_t smem_shift) {
  emu::options() = {emu::Async(async), seed, checks != 0, checks != 0, smem_shift};
}

// Sums over all launches so far.
uint64_t attn_emu_launches() { return emu::stats().launches; }
uint64_t attn_emu_products() { return emu::stats().mma; }
uint64_t attn_emu_bank_conflicts() { return emu::stats().bank_conflicts; }

}  // extern "C"
