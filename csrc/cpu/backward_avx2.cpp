// The backward kernels on AVX2 with FMA.
#define ATTN_ISA avx2
#include "vec_avx2.h"
//
#include "backward.h"
