"""Small float64 calls for the tests of the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn.spec import Operands

DOUBLE = torch.float64
SEED = torch.tensor([11, 5])


def call(
    B: int = 2, Hq: int = 4, Hkv: int = 2, L: int = 3, S: int = 5, D: int = 2, Dv: int = 3, **more: Any
) -> Operands:
    """A small float64 call whose q, k and v require grad."""
    q, k, v = (torch.randn(*s, dtype=DOUBLE) for s in ((B, Hq, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv)))
    more = {"scale": 0.7, **more}
    return Operands(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), **more)


def bias(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE).requires_grad_()
