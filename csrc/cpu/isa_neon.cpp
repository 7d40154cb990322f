// The kernels on AArch64.
#define ATTN_ISA neon
#define ATTN_ISA_NAME "neon"
#include "vec_neon.h"
//
#include "table.h"
