// The kernels on AVX-512 with products of bf16.
#define ATTN_ISA avx512bf16
#define ATTN_ISA_NAME "avx512bf16"
#include "vec_avx512bf16.h"
//
#include "table.h"
