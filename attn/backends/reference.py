"""The reference as a backend: every feature, any device, the scores held in memory."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from attn import reference
from attn.backends.base import ANY_DEVICE, Backend, Capability, Forward, Gradients, as_rows
from attn.spec import DecodeOperands, Operands

LARGE = 1 << 30
"""Bytes of float32 scores from which a call on an accelerator warns."""


class ReferenceBackend(Backend):
    """Runs `attn.reference`; asked last, it takes what no other backend can."""

    name = "reference"
    capability = Capability(
        devices=ANY_DEVICE,
        dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
        max_head_dim=1 << 16,
    )

    def forward(self, x: Operands) -> Forward:
        """See `Backend.forward`."""
        _warn_if_large(x)
        out, m, l = reference.forward(x)
        return as_rows(out), m, l

    def infer(self, x: Operands, weights: str) -> tuple[Tensor, Tensor | None]:
        """See `Backend.infer`."""
        _warn_if_large(x)
        return reference.infer(x, weights)

    def weights(self, x: Operands, m: Tensor, l: Tensor, average: bool) -> Tensor:
        """See `Backend.weights`."""
        return reference.weights(x, m, l, average)

    def forward_weights(self, x: Operands, average: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One pass over the scores for both."""
        _warn_if_large(x)
        out, m, l, weights = reference.forward_weights(x, average)
        return as_rows(out), m, l, weights

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
        dq, dk, dv, d_bias = reference.backward(x, residuals, d_out, d_lse, d_weights, needs_bias_grad)
        return as_rows(dq), as_rows(dk), as_rows(dv), d_bias

    def decode(self, x: DecodeOperands) -> tuple[Tensor, Tensor]:
        """See `Backend.decode`."""
        out, lse = reference.decode(x)
        return as_rows(out), lse


def _warn_if_large(x: Operands) -> None:
    size = 4 * math.prod(x.q.shape[:3]) * x.k.shape[2]
    if size > LARGE and x.q.device.type != "cpu":
        warnings.warn(
            f"the reference backend holds {size / 2**30:.1f} GiB of scores for query {tuple(x.q.shape)} and key "
            f"{tuple(x.k.shape)} on {x.q.device}; attn.explain(...) says why no other backend took the call",
            stacklevel=2,
        )
