// AVX-512 with pairs of bf16, whose products are made on AMX's tiles (product_amx.h).
#pragma once
#define ATTN_TILES
#include "vec_avx512bf16.h"

namespace attn::cpu::ATTN_ISA {
namespace {

constexpr int kRows = 32, kCols = 2;  // of a block: two tiles by two
constexpr int kDepth = 16;            // cells of a row of a tile: sums go over multiples of them

}  // namespace
}  // namespace attn::cpu::ATTN_ISA
