"""A call to be timed with its data, and what a peer is: a function from a `Problem` to a call without arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attn import masks
from attn.spec import AttentionSpec, DecodeOperands, Operands
from attn.testing import Case

Call = Callable[[], Tensor]


class Absent(Exception):
    """A peer that is not installed, or has no form of this call."""


@dataclass
class Problem:
    """A call with its data; q, k, v and the bias are leaves of autograd where gradients are wanted."""

    case: Case
    x: Operands | DecodeOperands

    @property
    def spec(self) -> AttentionSpec:
        """What kind of call it is."""
        return self.case.spec

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are wanted of."""
        if isinstance(self.x, DecodeOperands):
            return []
        return [t for t in (self.x.q, self.x.k, self.x.v, self.x.bias) if t is not None and t.requires_grad]


def problem(case: Case, x: Operands | DecodeOperands) -> Problem:
    """The call on that data, ready for autograd."""
    if isinstance(x, DecodeOperands) or not case.has_gradients:
        return Problem(case, x)
    q, k, v = (t.detach().requires_grad_() for t in (x.q, x.k, x.v))
    bias = x.bias.detach().requires_grad_(case.spec.bias_grad) if x.bias is not None else None
    return Problem(case, x._replace(q=q, k=k, v=v, bias=bias))


def packed(x: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, heads, D), as packed calls take them."""
    return x.q[0].transpose(0, 1), x.k[0].transpose(0, 1), x.v[0].transpose(0, 1)


def batched(out: Tensor) -> Tensor:
    """The way back."""
    return out.transpose(0, 1)[None]


def dense_mask(x: Operands) -> Tensor | None:
    """All that hides or biases a score as one mask in q's dtype, or bool; constant dimensions stay 1."""
    mask = masks.as_dense(x)
    return mask if mask is None or mask.dtype == torch.bool else mask.to(x.q.dtype)
