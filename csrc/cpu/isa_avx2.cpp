// The kernels on AVX2 with FMA.
#define ATTN_ISA avx2
#define ATTN_ISA_NAME "avx2"
#include "vec_avx2.h"
//
#include "table.h"
