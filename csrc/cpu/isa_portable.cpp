// The kernels on any CPU.
#define ATTN_ISA portable
#define ATTN_ISA_NAME "portable"
#include "vec_portable.h"
//
#include "table.h"
