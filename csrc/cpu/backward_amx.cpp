// The backward kernels on AVX-512 with products of bf16 on AMX's tiles.
#define ATTN_ISA amx
#include "vec_amx.h"
//
#include "backward.h"
