"""Attention kernels for PyTorch, and a drop-in replacement for `torch.nn.MultiheadAttention`.

Names are loaded when they are first used, so that `python -m attn info` also runs where torch does not.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from attn import integrations, masks, testing, transformer
    from attn.capture import capture_weights
    from attn.functional import attention, explain, scaled_dot_product_attention
    from attn.module import MultiheadAttention
    from attn.packed import decode_attention, varlen_attention
    from attn.planner import available_backends, use_backend
    from attn.plotting import plot_weights
    from attn.replacement import ReplaceWarning, replace, restore
    from attn.rotary import Rotary

_HOME = {  # no module is named like a function: importing it would hide the function
    "MultiheadAttention": "module",
    "Rotary": "rotary",
    "replace": "replacement",
    "restore": "replacement",
    "ReplaceWarning": "replacement",
    "capture_weights": "capture",
    "plot_weights": "plotting",
    "attention": "functional",
    "scaled_dot_product_attention": "functional",
    "explain": "functional",
    "varlen_attention": "packed",
    "decode_attention": "packed",
    "available_backends": "planner",
    "use_backend": "planner",
}
_MODULES = ("masks", "testing", "transformer", "integrations")

__all__ = [
    "MultiheadAttention",
    "ReplaceWarning",
    "Rotary",
    "attention",
    "available_backends",
    "capture_weights",
    "decode_attention",
    "explain",
    "integrations",
    "masks",
    "plot_weights",
    "replace",
    "restore",
    "scaled_dot_product_attention",
    "testing",
    "transformer",
    "use_backend",
    "varlen_attention",
]

# In a source tree `triton_kernels/` and `benchmarks/` lie beside this folder; installed, they lie in it.
_beside = Path(__file__).parent.parent
if (_beside / "triton_kernels").is_dir() and (_beside / "setup.py").is_file():
    __path__.append(str(_beside))


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"attn.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'attn' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"attn.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
