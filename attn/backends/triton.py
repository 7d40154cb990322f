"""The Triton kernels as a backend: every feature, on NVIDIA and AMD GPUs, compiled at first use.

With TRITON_INTERPRET=1 the same kernels run on CPU tensors, for tests; then only where this backend is forced.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from attn.backends.base import Backend, Capability, Forward, Gradients
from attn.spec import AttentionSpec, DecodeOperands, Operands

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
"""Read once, as Triton itself reads it when the kernels are defined."""


@functools.cache
def _passes() -> ModuleType:
    return importlib.import_module("attn.triton_kernels.passes")


R = TypeVar("R")


def _on_device(run: Callable[..., R]) -> Callable[..., R]:
    """Make the tensors' GPU the current one for the launch."""

    @functools.wraps(run)
    def inner(self: TritonBackend, x: Any, *args: Any) -> R:
        index = x.q.device.index
        if index is None or index == torch.cuda.current_device():
            return run(self, x, *args)
        with torch.cuda.device(index):
            return run(self, x, *args)

    return inner


class TritonBackend(Backend):
    """Runs `triton_kernels/`."""

    name = "triton"
    needs_proof = True
    capability = Capability(
        devices=frozenset({"cuda", "cpu"} if INTERPRETED else {"cuda"}),
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
        oldest_sm=80,
    )

    def available(self) -> str | None:
        """None where Triton and a GPU, or its interpreter, are there."""
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; pip install 'triton>=3.6,<4' (its wheels are for Linux)"
        if not INTERPRETED and not torch.cuda.is_available():
            return "finds no GPU; TRITON_INTERPRET=1 runs its kernels slowly on the CPU, for tests"
        return None

    def only_forced(self, spec: AttentionSpec) -> str | None:
        """On CPU tensors, always."""
        return "runs CPU tensors in Triton's interpreter, only when forced" if spec.device == "cpu" else None

    @_on_device
    def forward(self, x: Operands) -> Forward:
        """See `Backend.forward`."""
        result: Forward = _passes().forward(x)
        return result

    @_on_device
    def weights(self, x: Operands, m: Tensor, l: Tensor, average: bool) -> Tensor:
        """See `Backend.weights`."""
        result: Tensor = _passes().weights(x, m, l, average)
        return result

    @_on_device
    def backward(
        self,
        x: Operands,
        residuals: Forward,
        d_out: Tensor,
        d_lse: Tensor | None,
        d_weights: Tensor | None,
        needs_bias_grad: bool,
    ) -> Gradients:
        """See `Backend.backward`."""
        result: Gradients = _passes().backward(x, residuals, d_out, d_lse, d_weights, needs_bias_grad)
        return result

    @_on_device
    def decode(self, x: DecodeOperands) -> tuple[Tensor, Tensor]:
        """See `Backend.decode`."""
        result: tuple[Tensor, Tensor] = _passes().decode(x)
        return result

    def tile(self, spec: AttentionSpec) -> tuple[int, int]:
        """(queries, keys) of the forward tile."""
        from attn.triton_kernels import arguments, config

        size = max(spec.head_dim, spec.value_dim)
        t = config.tile(spec.arch, "forward", size, arguments.math_of(spec.dtype), config.LIGHT)
        return t.rows, t.keys
