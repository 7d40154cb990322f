// The backward kernels on any CPU.
#define ATTN_ISA portable
#include "vec_portable.h"
//
#include "backward.h"
