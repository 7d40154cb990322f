"""A case through the public functions: the whole path from arguments to autograd, as a user calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn import functional, masks, packed, rng
from attn.masks import Mask
from attn.spec import UNBOUNDED, DecodeOperands, Operands
from attn.testing.cases import Case
from attn.testing.run import Results, judge
from attn.testing.tolerance import Verdict, assert_verdicts


def mask_of(x: Operands) -> Mask | None:
    """The mask that `attn.masks` would make for these operands; None where nothing is hidden."""
    parts: list[Mask] = []
    left, right = (None if side == UNBOUNDED else side for side in (x.left, x.right))
    anchor = "end" if x.end else "start"
    if x.has_band:
        plain = masks.window(left, right, anchor)
        parts.append(plain if x.prefix is None else masks.prefix_lm(x.prefix, (left, right), anchor))
    if x.key_lengths is not None:
        parts.append(masks.padding(x.key_lengths, x.query_lengths))
    elif x.query_lengths is not None:
        full = torch.full_like(x.query_lengths, x.k.shape[2])
        parts.append(masks.padding(full, x.query_lengths))
    if x.ids_q is not None and x.ids_k is not None:
        parts.append(masks.documents((x.ids_q, x.ids_k)))
    if x.keep is not None:
        parts.append(masks.dense(x.keep))
    whole = parts[0] if parts else None
    for part in parts[1:]:
        whole = part if whole is None else whole & part
    return whole


def call(case: Case, backend: str | None = None) -> tuple[Results, Operands | DecodeOperands]:
    """The case by `attn.attention`, `varlen_attention` or `decode_attention`, differentiated by autograd.

    Returns the operands too, with the dropout seed that the call drew from torch's generator.
    """
    x = case.operands()
    torch.manual_seed(case.seed)
    if isinstance(x, DecodeOperands):
        return _decode(x, backend), x
    if x.rng is not None:
        x = x._replace(rng=rng.draw(x.q.device))
        torch.manual_seed(case.seed)
    grad = case.has_gradients
    leaves = [t.detach().requires_grad_(grad) for t in (x.q, x.k, x.v)]
    if x.bias is not None:
        leaves.append(x.bias.detach().requires_grad_(grad and case.spec.bias_grad))
    common: dict[str, Any] = {
        "alibi_slopes": x.alibi_slopes,
        "dropout_p": x.dropout_p,
        "scale": x.scale,
        "softcap": x.softcap or None,
        "backend": backend,
        "mask": mask_of(x._replace(cu_seqlens_q=None, cu_seqlens_k=None)),
    }
    lse: Tensor | None
    weights: Tensor | None
    if x.cu_seqlens_q is not None:
        out, lse, weights = *_varlen(x, leaves, common), None
    else:
        bias = leaves[3] if len(leaves) > 3 else None
        out, lse, weights = functional.attend(
            *leaves[:3], bias=bias, return_lse=case.spec.lse, weights=case.spec.weights, **common
        )
    results = Results(
        out.detach(), None if lse is None else lse.detach(), weights=None if weights is None else weights.detach()
    )
    if grad:
        incoming = zip((out, lse, weights), case.gradients(x), strict=True)
        pairs = [(t, g) for t, g in incoming if t is not None and g is not None]
        wanted = [t for t in leaves if t.requires_grad]
        grads = torch.autograd.grad([t for t, _ in pairs], wanted, [g for _, g in pairs])
        for name, g in zip(("dq", "dk", "dv", "d_bias"), grads, strict=False):
            setattr(results, name, g)
    return results, x


def assert_public_case(case: Case, backend: str | None = None) -> list[Verdict]:
    """Run a case by the public functions and hold it against the oracle; raises AssertionError."""
    results, x = call(case, backend)
    verdicts = judge(case, results, x)
    assert_verdicts(verdicts, f"{case}   [public, {backend or 'planned'}]")
    return verdicts


def _varlen(x: Operands, leaves: list[Tensor], common: dict[str, Any]) -> tuple[Tensor, Tensor]:
    q, k, v = (t[0].transpose(0, 1) for t in leaves[:3])
    out, lse = packed.varlen_attention(
        q,
        k,
        v,
        cu_seqlens_q=x.cu_seqlens_q,  # type: ignore[arg-type]
        cu_seqlens_k=x.cu_seqlens_k,  # type: ignore[arg-type]
        max_seqlen_q=x.max_seqlen_q,
        max_seqlen_k=x.max_seqlen_k,
        return_lse=True,
        **common,
    )
    return out.transpose(0, 1)[None], lse[None]


def decode_options(x: DecodeOperands) -> dict[str, Any]:
    """The keyword arguments that `attn.decode_attention` makes these operands of."""
    return {
        "lengths": x.lengths,
        "block_table": x.block_table,
        "window": None if x.left == UNBOUNDED else (x.left, 0),
        "alibi_slopes": x.alibi_slopes,
        "scale": x.scale,
        "softcap": x.softcap or None,
    }


def _decode(x: DecodeOperands, backend: str | None) -> Results:
    out, lse = packed.decode_attention(x.q, x.k_cache, x.v_cache, return_lse=True, backend=backend, **decode_options(x))
    return Results(out, lse)
