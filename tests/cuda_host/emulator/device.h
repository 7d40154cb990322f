// What a kernel calls of the emulator, by way of prim_host.h: everything that compiles once per kernel, and
// so without the larger headers of the library.
#pragma once
#include <cstdint>

namespace emu {

// A line of a kernel.
struct Loc {
  const char* file;
  int line;
};

struct Dim3 {
  int64_t x = 1, y = 1, z = 1;
};

// kernel(params) by every thread of every block. "" or the first report, until the next launch.
const char* run(Dim3 grid, int threads, int smem_bytes, void (*kernel)(const void*), const void* params);

uint32_t tid();
Dim3 block_index();
uint32_t smem_base();

void shared_read(uint32_t address, void* to, uint32_t bytes, Loc);
void shared_write(uint32_t address, const void* from, uint32_t bytes, Loc);
void global_read(const void* from, void* to, uint32_t bytes, Loc);
void global_write(void* to, const void* from, uint32_t bytes, Loc);

void cp_async(uint32_t to, const void* from, uint32_t bytes, int valid_bytes, Loc);
void cp_async_commit(Loc);
void cp_async_wait(int pending, Loc);

void ldmatrix_x4(uint32_t* r, uint32_t address, bool trans, Loc);
enum class Element { bf16, fp16, tf32 };
void mma(float* d, const uint32_t* a, const uint32_t* b, Element, Loc);  // m16n8k16, or m16n8k8 for tf32
uint32_t shfl_xor(uint32_t v, int mask, Loc);
uint32_t shfl_idx(uint32_t v, int from, Loc);
bool vote_any(bool v, Loc);
void sync_warp(Loc);
void sync_threads(Loc);

}  // namespace emu
