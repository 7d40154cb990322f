// The functions of torch's stable C interface that only its CUDA builds have; see csrc/torch_stable.h.
#pragma once
#include "../torch_stable.h"

extern "C" {
ATTN_TORCH_API int32_t aoti_torch_get_current_cuda_stream(int32_t, void**);
}
