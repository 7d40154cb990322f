"""Where other libraries let their attention be exchanged for ours.

| call | what runs on our kernels then |
| --- | --- |
| `register_torch()` | `F.scaled_dot_product_attention`, once `activate_flash_attention_impl("attn")` was called |
| `sdpa_override()` | `F.scaled_dot_product_attention` inside a `with` block: timm, diffusers, any torch version |
| `register_transformers()` | Hugging Face models with `attn_implementation="attn"` |

And the way out: `standard_ops(program)` gives an exported program without our ops, for ONNX and other runtimes.

Models that hold `nn.MultiheadAttention` (open_clip, SigLIP, ...) need none of them: `attn.replace(model)`.
"""

from __future__ import annotations

from attn.integrations.export import standard_ops
from attn.integrations.huggingface import register_transformers
from attn.integrations.override import sdpa_override
from attn.integrations.torch_registry import register_torch

__all__ = ["register_torch", "register_transformers", "sdpa_override", "standard_ops"]
