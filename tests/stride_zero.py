"""Gradients from above with stride zero, as `expand` makes them: a backward pass has to read them as their copies."""

from __future__ import annotations

import torch
from torch import Tensor

from attn.backends.base import Backend
from attn.spec import Operands

OUTPUT_DIMS = ((0, 1, 2, 3), (3,), (2,), (0, 1))


def _assert_copies_change_nothing(backend: Backend, x: Operands, d_out: Tensor, *more: Tensor | None) -> None:
    residuals = backend.forward(x)
    wide = (d_out.expand_as(residuals[0]), *more)
    copies = (None if t is None else t.contiguous() for t in wide)
    got, want = backend.backward(x, residuals, *wide, False), backend.backward(x, residuals, *copies, False)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], want[:3], strict=True))


def assert_output_gradient(backend: Backend, x: Operands, dims: tuple[int, ...]) -> None:
    """d_out with stride zero along `dims`."""
    shape = (*x.q.shape[:3], x.v.shape[3])
    narrow = torch.randn([1 if d in dims else n for d, n in enumerate(shape)])
    _assert_copies_change_nothing(backend, x, narrow, None, None)


def assert_gradients_of_lse_and_weights(backend: Backend, x: Operands) -> None:
    """d_lse along queries, the averaged weights' along queries, d_out along everything."""
    B, H, L, _ = x.q.shape
    S = x.k.shape[2]
    d_lse, d_weights = torch.randn(B, H, 1).expand(B, H, L), torch.randn(B, 1, S).expand(B, L, S)
    _assert_copies_change_nothing(backend, x, torch.ones(()), d_lse, d_weights)
