// The kernels on AVX-512.
#define ATTN_ISA avx512
#define ATTN_ISA_NAME "avx512"
#include "vec_avx512.h"
//
#include "table.h"
