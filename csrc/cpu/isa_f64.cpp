// The kernels of float64, on any CPU: the same source over vectors of double.
#define ATTN_ISA f64
#define ATTN_DOUBLE
#include "vec_portable.h"
//
#include "table.h"
