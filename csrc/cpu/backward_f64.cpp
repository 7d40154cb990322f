// The backward kernels of float64, on any CPU.
#define ATTN_ISA f64
#define ATTN_DOUBLE
#include "vec_portable.h"
//
#include "backward.h"
