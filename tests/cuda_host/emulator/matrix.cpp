// ldmatrix and mma: which lane holds which element. Layouts as in the PTX manual's figures.
#include <algorithm>
#include <cstring>

#include "machine.h"
#include "numbers.h"

namespace emu {
namespace {

struct LdmatrixArg {
  uint32_t* r;
  uint32_t address;
};

struct MmaArg {
  float* d;
  const uint32_t *a, *b;
};

float half_of(uint32_t packed, int high, Element e) {
  const uint16_t h = uint16_t(high ? packed >> 16 : packed);
  return e == Element::bf16 ? bf16_to_float(h) : fp16_to_float(h);
}

// a: 16 x k, b: k x 8, c: 16 x 8. Lane l holds rows l / 4 and l / 4 + 8 of a and c, column l / 4 of b.
struct Tile {
  float a[16][16], b[16][8], c[16][8];
};

void gather_16bit(Tile& t, int lane, const MmaArg& x, Element e) {
  const int group = lane / 4, pair = lane % 4 * 2;
  for (int h = 0; h < 2; ++h) {
    t.a[group][pair + h] = half_of(x.a[0], h, e);
    t.a[group + 8][pair + h] = half_of(x.a[1], h, e);
    t.a[group][pair + 8 + h] = half_of(x.a[2], h, e);
    t.a[group + 8][pair + 8 + h] = half_of(x.a[3], h, e);
    t.b[pair + h][group] = half_of(x.b[0], h, e);
    t.b[pair + 8 + h][group] = half_of(x.b[1], h, e);
  }
}

void gather_tf32(Tile& t, int lane, const MmaArg& x) {
  constexpr uint32_t kUpper19 = 0xffffe000;  // the unit does not see the rest
  const int group = lane / 4, k = lane % 4;
  t.a[group][k] = bits_float(x.a[0] & kUpper19);
  t.a[group + 8][k] = bits_float(x.a[1] & kUpper19);
  t.a[group][k + 4] = bits_float(x.a[2] & kUpper19);
  t.a[group + 8][k + 4] = bits_float(x.a[3] & kUpper19);
  t.b[k][group] = bits_float(x.b[0] & kUpper19);
  t.b[k + 4][group] = bits_float(x.b[1] & kUpper19);
}

// The lanes' registers <-> c.
template <class F>
void each_accumulator(Tile& t, int lane, F f) {
  const int group = lane / 4, pair = lane % 4 * 2;
  for (int h = 0; h < 2; ++h) {
    f(h, t.c[group][pair + h]);
    f(2 + h, t.c[group + 8][pair + h]);
  }
}

int bank_conflicts(const uint32_t (&rows)[8]) {
  int per_bank[8] = {}, worst = 1;
  for (int i = 0; i < 8; ++i) {
    const bool seen = std::find(rows, rows + i, rows[i]) != rows + i;
    if (!seen) worst = std::max(worst, ++per_bank[rows[i] / 16 % 8]);
  }
  return worst - 1;
}

}  // namespace

void ldmatrix_x4(uint32_t* r, uint32_t address, bool trans, Loc loc) {
  LdmatrixArg mine{r, address};
  if (!warp_arrive(Op::Ldmatrix, &mine, loc)) return;
  for (int m = 0; m < 4; ++m) {
    uint16_t t[8][8];
    uint32_t rows[8];
    for (int i = 0; i < 8; ++i) {
      rows[i] = arg_of_lane<LdmatrixArg>(m * 8 + i).address;
      if (rows[i] % 16)
        fail(Err::Align, loc, "ldmatrix row of lane %d at shared byte %u", m * 8 + i, rows[i] - smem_base());
      check_read(rows[i], 16, (machine.current & ~31u) + uint32_t(m * 8 + i), true, loc);
      std::memcpy(t[i], shared(rows[i]), 16);
    }
    machine.stats.bank_conflicts += uint64_t(bank_conflicts(rows));
    for (int l = 0; l < 32; ++l) {
      const int p = l / 4, q = l % 4 * 2;
      const uint16_t low = trans ? t[q][p] : t[p][q], high = trans ? t[q + 1][p] : t[p][q + 1];
      arg_of_lane<LdmatrixArg>(l).r[m] = low | uint32_t(high) << 16;
    }
  }
  release_warp();
}

void mma(float* d, const uint32_t* a, const uint32_t* b, Element e, Loc loc) {
  MmaArg mine{d, a, b};
  if (!warp_arrive(Op::Mma, &mine, loc)) return;
  Tile t;
  const int depth = e == Element::tf32 ? 8 : 16;
  for (int l = 0; l < 32; ++l) {
    MmaArg& x = arg_of_lane<MmaArg>(l);
    e == Element::tf32 ? gather_tf32(t, l, x) : gather_16bit(t, l, x, e);
    each_accumulator(t, l, [&](int i, float& c) { c = x.d[i]; });
  }
  for (int i = 0; i < 16; ++i) {
    float sum[8] = {};
    for (int k = 0; k < depth; ++k)
      for (int j = 0; j < 8; ++j) sum[j] += t.a[i][k] * t.b[k][j];
    for (int j = 0; j < 8; ++j) t.c[i][j] += sum[j];
  }
  for (int l = 0; l < 32; ++l) {
    MmaArg& x = arg_of_lane<MmaArg>(l);
    each_accumulator(t, l, [&](int i, float& c) { x.d[i] = c; });
  }
  ++machine.stats.mma;
  release_warp();
}

}  // namespace emu
