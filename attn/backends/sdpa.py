"""PyTorch's own `F.scaled_dot_product_attention`, for whatever no kernel of ours does yet and it does right.

It is called as a whole and keeps PyTorch's autograd. What PyTorch's function has no argument for (windows, padding,
documents, ALiBi) becomes one dense mask. As everywhere in PyTorch, NaN in a key that such a mask hides still spreads
through the row; NaN past `key_lengths` or `query_lengths` does not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attn import masks
from attn.backends.base import ALL, ANY_DEVICE, Backend, Capability, record
from attn.spec import AttentionSpec, Operands

REFUSED = frozenset({"dropout", "softcap", "lse", "weights", "paged"})
"""Features that PyTorch's function lacks, or has with other random numbers than ours."""


class SdpaBackend(Backend):
    """Runs PyTorch's fused attention."""

    name = "sdpa"
    whole_call = True
    capability = Capability(
        devices=ANY_DEVICE,
        dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
        ops=frozenset({"attention"}),
        features=ALL - REFUSED,
        max_head_dim=1 << 16,
    )

    def refuses(self, spec: AttentionSpec) -> str | None:
        """Calls that PyTorch's function takes and gets wrong."""
        if not spec.scale_positive:
            return "does not do a scale <= 0 (PyTorch's kernels take the row maximum before scaling)"
        if spec.bias and spec.grad and spec.device == "cpu":
            return "on CPU its gradient is wrong in rows where a float mask is finfo.min throughout"
        if spec.deterministic and spec.grad and spec.device != "cpu":
            return "does not promise deterministic gradients: that depends on the kernel PyTorch picks"
        return None

    def call(self, spec: AttentionSpec, x: Operands) -> Tensor:
        """out (B, Hq, L, Dv), recorded by PyTorch's autograd."""
        record(self.name, "call")
        if not torch._C._is_any_autocast_enabled():
            return _call(spec, x)
        with torch.autocast(spec.device, enabled=False):  # it would round float masks to 16 bits
            return _call(spec, x)


def _call(spec: AttentionSpec, x: Operands) -> Tensor:
    dense = spec.key_lengths or spec.query_lengths or spec.documents or spec.keep or spec.bias or spec.alibi
    if not (dense or spec.band):
        return F.scaled_dot_product_attention(x.q, x.k, x.v, scale=x.scale, enable_gqa=spec.grouped)
    if spec.causal and not dense and (spec.band == "start" or x.q.shape[2] == x.k.shape[2]):
        return F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, scale=x.scale, enable_gqa=spec.grouped)
    q, k, v = _hide_past_lengths(x)
    mask = masks.as_dense(x)
    if mask is None or mask.dtype == torch.bool or mask.dtype == q.dtype:
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=x.scale, enable_gqa=spec.grouped)
    else:  # PyTorch's kernels refuse or misread a mask of another dtype; rounded to 16 bits it is another mask
        dtype = torch.promote_types(torch.promote_types(mask.dtype, q.dtype), torch.float32)
        q, k, v, mask = (t.to(dtype) for t in (q, k, v, mask))
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=x.scale, enable_gqa=spec.grouped).to(x.q.dtype)
    if x.query_lengths is None:
        return out
    return out.masked_fill(masks.past(x.query_lengths, out.shape[2]), 0.0)  # and 0 for whatever d_out holds there


def _hide_past_lengths(x: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros past the lengths, so that nothing written there spreads as 0 * NaN."""
    q, k, v = x.q, x.k, x.v
    if x.key_lengths is not None:
        past = masks.past(x.key_lengths, k.shape[2])
        k, v = k.masked_fill(past, 0.0), v.masked_fill(past, 0.0)
    if x.query_lengths is not None:
        q = q.masked_fill(masks.past(x.query_lengths, q.shape[2]), 0.0)
    return q, k, v
