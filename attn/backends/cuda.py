"""The CUDA C++ kernels as a backend: every feature, on NVIDIA GPUs of compute capability 8.0 and newer.

With ATTN_CUDA_EMULATED=<path of the emulated library> the same kernels run on CPU tensors, for tests; then only where
this backend is forced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn import native, native_cuda
from attn.backends.base import Backend, Capability, Forward, Gradients
from attn.spec import AttentionSpec, DecodeOperands, Operands


class CudaBackend(Backend):
    """Runs `csrc/cuda/`."""

    name = "cuda"
    needs_proof = True
    capability = Capability(
        devices=frozenset({"cpu"} if native_cuda.EMULATED else {"cuda"}),
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
        oldest_sm=80,
    )

    def available(self) -> str | None:
        """None where the library was built, loads, and finds a GPU and a driver that is new enough."""
        return native_cuda.load()

    def refuses(self, spec: AttentionSpec) -> str | None:
        """GPUs for which the library has no code."""
        if spec.sm is None:
            return None
        built = native_cuda.images()
        if built and not native_cuda.runs_on(spec.sm, built):
            ptx = f" and PTX of {built['ptx']}" if built["ptx"] else ""
            has = f"{', '.join(built['archs'])}{ptx}"
            return f"was built for {has}, not for {spec.arch}; ATTN_CUDA_ARCHS names what it is built for"
        return None

    def only_forced(self, spec: AttentionSpec) -> str | None:
        """On CPU tensors, always."""
        return "runs CPU tensors in an emulator, only when forced" if spec.device == "cpu" else None

    def forward(self, x: Operands) -> Forward:
        """See `Backend.forward`."""
        out, m, l, _ = native_cuda.forward(*x, native.NO_WEIGHTS, True)
        return out, m, l

    def infer(self, x: Operands, weights: str) -> tuple[Tensor, Tensor | None]:
        """Without residuals, weights after it."""
        wanted = native.WEIGHTS[weights]
        out, _, _, w = native_cuda.forward(*x, wanted, False)
        return out, w

    def weights(self, x: Operands, m: Tensor, l: Tensor, average: bool) -> Tensor:
        """See `Backend.weights`."""
        result: Tensor = native_cuda.weights(m, l, *x, average)
        return result

    def forward_weights(self, x: Operands, average: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One call for both."""
        result: tuple[Tensor, Tensor, Tensor, Tensor]
        result = native_cuda.forward(*x, native.MEAN if average else native.HEADS, True)
        return result

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
        result: Gradients = native_cuda.backward(d_out, d_lse, d_weights, *residuals, *x, needs_bias_grad)
        return result

    def decode(self, x: DecodeOperands) -> tuple[Tensor, Tensor]:
        """See `Backend.decode`."""
        result: tuple[Tensor, Tensor] = native_cuda.decode(*x)
        return result
