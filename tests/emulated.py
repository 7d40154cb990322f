"""A tensor-core kernel in plain torch: keys in blocks, a lazily moved shift, P and dS rounded to 16 bits.

An honest result of another kind than the reference's, for testing the tolerances themselves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attn import reference
from attn.spec import Operands
from attn.testing import Results

BLOCK = 16


def kernel(x: Operands, d_out: Tensor, d_lse: Tensor | None = None, bias_grad: bool = False) -> Results:
    """Forward and backward as a fused kernel rounds them."""
    dtype = x.q.dtype
    s, d_cap, _ = reference.scores(x)
    q, k, v = reference.within_lengths(x)
    k, v = reference.per_query_head(x, k), reference.per_query_head(x, v)
    m = s.new_full(s.shape[:-1], reference.NEG_INF)
    l, out = torch.zeros_like(m), s.new_zeros(*m.shape, v.shape[-1])
    for start in range(0, s.shape[-1], BLOCK):
        block = s[..., start : start + BLOCK]
        top = block.amax(-1)
        moved = torch.where(top > m + 8 * math.log(2), top, m)  # only when the shift is too far off
        old = torch.where(m == reference.NEG_INF, 0.0, torch.exp(m - _finite(moved)))
        p = torch.exp(block - _finite(moved)[..., None])
        l = l * old + p.sum(-1)
        kept = reference.dropped(x, torch.ones_like(s))[..., start : start + BLOCK]
        out = out * old[..., None] + (p * kept).to(dtype).float() @ v[:, :, start : start + BLOCK]
        m = moved
    dead = l == 0
    out = (out / l.masked_fill(dead, 1.0)[..., None]).to(dtype)
    p = reference.normalised(s, m, l)
    g = d_out.float().masked_fill(dead[..., None], 0.0)
    delta = (g * out.float()).sum(-1)
    if d_lse is not None:
        delta = delta - d_lse.masked_fill(dead, 0.0)
    ds = p * (reference.dropped(x, g @ v.transpose(-1, -2)) - delta[..., None])
    d_bias = ds.sum_to_size(x.bias.shape).to(x.bias.dtype) if bias_grad and x.bias is not None else None
    ds = (ds if d_cap is None else ds * d_cap).to(dtype).float()
    dv = reference.per_key_head(x, reference.dropped(x, p).to(dtype).float().transpose(-1, -2) @ g)
    dk = reference.per_key_head(x, ds.transpose(-1, -2) @ q) * x.scale
    dq = ds @ k * x.scale
    return Results(out, reference.lse_of(m, l), m, l, None, dq.to(dtype), dk.to(dtype), dv.to(dtype), d_bias)


def _finite(m: Tensor) -> Tensor:
    return m.masked_fill(m == reference.NEG_INF, 0.0)
