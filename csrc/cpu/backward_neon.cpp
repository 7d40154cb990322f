// The backward kernels on AArch64.
#define ATTN_ISA neon
#include "vec_neon.h"
//
#include "backward.h"
