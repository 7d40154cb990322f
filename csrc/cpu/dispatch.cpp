// Which instruction set runs.
#include <cstring>

#include "kernels.h"

#if defined(ATTN_HAVE_AVX2) || defined(ATTN_HAVE_AVX512)
#ifdef _MSC_VER
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace attn::cpu {

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

  bool b(int bit) const { return ebx >> bit & 1; }
  bool c(int bit) const { return ecx >> bit & 1; }
};

Leaf leaf(uint32_t number) {
  Leaf x{};
#ifdef _MSC_VER
  int words[4];
  __cpuid(words, 0);
  if (static_cast<uint32_t>(words[0]) < number) return x;
  __cpuidex(words, static_cast<int>(number), 0);
  std::memcpy(&x, words, sizeof x);
#else
  if (!__get_cpuid_count(number, 0, &x.eax, &x.ebx, &x.ecx, &x.edx)) return Leaf{};
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
#endif
#endif
bool always() { return true; }

struct Set {
  const Kernels* table;
  bool (*runs)();
};

const Set kSets[] = {
#ifdef ATTN_HAVE_AVX512
    {&avx512::table, has_avx512},
#endif
#ifdef ATTN_HAVE_AVX2
    {&avx2::table, has_avx2},
#endif
#ifdef ATTN_HAVE_NEON
    {&neon::table, always},
#endif
    {&portable::table, always},
};

}  // namespace

const Kernels* kernels(const char* isa) {
  for (const Set& set : kSets)
    if ((isa == nullptr || std::strcmp(isa, set.table->isa) == 0) && set.runs()) return set.table;
  return nullptr;
}

}  // namespace attn::cpu
