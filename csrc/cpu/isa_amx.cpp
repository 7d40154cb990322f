// The kernels on AVX-512 with products of bf16 on AMX's tiles.
#define ATTN_ISA amx
#define ATTN_ISA_NAME "amx"
#include "vec_amx.h"
//
#include "table.h"
