// The backward kernels on AVX-512.
#define ATTN_ISA avx512
#include "vec_avx512.h"
//
#include "backward.h"
