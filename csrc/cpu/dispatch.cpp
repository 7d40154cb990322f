// Which instruction set runs.
#include <cstring>

#include "kernels.h"

#ifdef ATTN_HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(ATTN_HAVE_AVX2) || defined(ATTN_HAVE_AVX512)
#ifdef _MSC_VER
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace attn::cpu {

namespace amx {
extern const Kernels table;
}
namespace avx512bf16 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace neon {
extern const Kernels table;
}
namespace portable {
extern const Kernels table;
}

namespace {

#if defined(ATTN_HAVE_AVX2) || defined(ATTN_HAVE_AVX512)
struct Leaf {
  uint32_t eax, ebx, ecx, edx;

  bool a(int bit) const { return eax >> bit & 1; }
  bool b(int bit) const { return ebx >> bit & 1; }
  bool c(int bit) const { return ecx >> bit & 1; }
  bool d(int bit) const { return edx >> bit & 1; }
};

Leaf leaf(uint32_t number, uint32_t part = 0) {
  Leaf x{};
#ifdef _MSC_VER
  int words[4];
  __cpuid(words, 0);
  if (static_cast<uint32_t>(words[0]) < number) return x;
  __cpuidex(words, static_cast<int>(number), static_cast<int>(part));
  std::memcpy(&x, words, sizeof x);
#else
  if (!__get_cpuid_count(number, part, &x.eax, &x.ebx, &x.ecx, &x.edx)) return Leaf{};
#endif
  return x;
}

// Which registers the operating system saves: bits of XCR0. Only where OSXSAVE is set.
uint64_t saved_registers() {
#ifdef _MSC_VER
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
#endif
}

bool has_avx2() {
  const Leaf one = leaf(1);
  if (!(one.c(27) && one.c(28) && one.c(12) && one.c(29))) return false;  // OSXSAVE, AVX, FMA, F16C
  return (saved_registers() & 0x6) == 0x6 && leaf(7).b(5);
}
#ifdef ATTN_HAVE_AVX512
bool has_avx512() {
  if (!has_avx2() || (saved_registers() & 0xe6) != 0xe6) return false;
  const Leaf seven = leaf(7);
  return seven.b(16) && seven.b(17) && seven.b(30) && seven.b(31);  // F, DQ, BW, VL
}
#ifdef ATTN_HAVE_AVX512BF16
bool has_avx512bf16() { return has_avx512() && leaf(7, 1).a(5); }
#ifdef ATTN_HAVE_AMX
// Linux lets a process use the tiles' registers, XCR0's component 18, once it has asked for them.
bool grants_tiles() {
  constexpr long kAskForComponent = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kAskForComponent, kTileData) == 0;
}
bool has_amx() {
  if (!has_avx512bf16() || (saved_registers() & 0x60000) != 0x60000) return false;
  const Leaf seven = leaf(7);
  return seven.d(22) && seven.d(24) && grants_tiles();  // AMX-BF16, AMX-TILE
}
#endif

// Whether a pair of bf16 is multiplied as quickly as a float. Measured, it is on AMD's cores (Zen 4: a dot
// per cycle) and not on Intel's, where widening wins (half the rate of float). Asked of the maker and not of
// a clock, for which set runs decides the bits of a result.
bool bf16_is_fast() {
  const Leaf maker = leaf(0);
  return maker.ebx == 0x68747541 && maker.edx == 0x69746e65 && maker.ecx == 0x444d4163;  // AuthenticAMD
}
#endif
#endif
#endif
bool always() { return true; }

struct Set {
  const Kernels* table;
  bool (*runs)();
  bool (*preferred)();  // to those after it
};

const Set kSets[] = {
#ifdef ATTN_HAVE_AMX
    {&amx::table, has_amx, always},
#endif
#ifdef ATTN_HAVE_AVX512BF16
    {&avx512bf16::table, has_avx512bf16, bf16_is_fast},
#endif
#ifdef ATTN_HAVE_AVX512
    {&avx512::table, has_avx512, always},
#endif
#ifdef ATTN_HAVE_AVX2
    {&avx2::table, has_avx2, always},
#endif
#ifdef ATTN_HAVE_NEON
    {&neon::table, always, always},
#endif
    {&portable::table, always, always},
};

}  // namespace

const Kernels* kernels(const char* isa) {
  for (const Set& set : kSets) {
    const bool wanted = isa ? std::strcmp(isa, set.table->isa) == 0 : set.preferred();
    if (wanted && set.runs()) return set.table;  // asked last: what a process asked Linux for stays
  }
  return nullptr;
}

}  // namespace attn::cpu
