"""`sdpa_override`: PyTorch's attention function by our kernels inside of a block, whoever calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attn.functional import scaled_dot_product_attention


class sdpa_override(TorchFunctionMode):
    """Route `F.scaled_dot_product_attention` to `attn.scaled_dot_product_attention` inside the block.

    By torch's own hook: it reaches libraries that imported the function by name, ends with the block and holds for the
    thread only. Arguments, errors and results are those of `attn.scaled_dot_product_attention`.

    Args:
        backend: the backend that must run the calls; None lets the planner choose.

    >>> import torch
    >>> with sdpa_override("reference") as routed:
    ...     out = F.scaled_dot_product_attention(*torch.randn(3, 1, 2, 4, 8))
    >>> routed.calls
    1
    """

    def __init__(self, backend: str | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.calls = 0
        """How many calls were routed."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        return scaled_dot_product_attention(*args, **kwargs, backend=self.backend)
