"""The public calls: each checks its arguments once, asks the planner for a backend and runs it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attn import masks, ops, planner, reference, rng
from attn.backends.base import Backend
from attn.masks import Mask
from attn.operands import checked, spec_of
from attn.planner import Explanation
from attn.spec import UNBOUNDED, AttentionSpec, Operands


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention with every feature: softmax(scale * q kᵀ + bias, masked) v.

    Args:
        q: (B, Hq, L, D), float32, bfloat16, float16 or float64, any strides.
        k: (B, Hkv, S, D) with Hq a multiple of Hkv (grouped-query attention, Ainslie et al. 2023).
        v: (B, Hkv, S, Dv).
        mask: what `attn.masks` makes, or None. A row without a visible key gives output 0, lse -inf, gradient 0.
        bias: float tensor broadcastable to (B, Hq, L, S), added in float32 to the scaled scores; -inf hides. Its
            gradient, reduced over the broadcast dims, comes back in its own dtype.
        alibi_slopes: (Hq,) or (B, Hq): adds -slope * |i + S - L - j| (Press et al. 2022).
        dropout_p: probability in [0, 1] with which a weight is dropped, the others divided by 1 - p; bits by
            Philox4x32-7 from a seed that torch's default generator of the device gives per call.
        scale: factor of the scores; None means 1 / sqrt(D).
        softcap: c > 0 turns scaled scores s into c * tanh(s / c) before bias and mask (Gemma 2, 2024).
        return_lse: also return the log-sum-exp of each row.
        backend: a name of `attn.available_backends()` that must run the call; None lets the planner choose.

    Returns:
        out (B, Hq, L, Dv) in q's dtype, and with `return_lse` also lse (B, Hq, L), natural log, float32 (float64 for
        float64), differentiable.

    Raises:
        TypeError: an argument of the wrong kind or dtype; a bare tensor as mask.
        ValueError: a shape, device, number or backend name that does not fit; lengths outside [0, S] on CPU.
        RuntimeError: a forced backend cannot run the call.
    """
    out, lse, _ = attend(
        q,
        k,
        v,
        mask=mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        scale=scale,
        softcap=softcap,
        return_lse=return_lse,
        backend=backend,
    )
    return (out, lse) if lse is not None else out


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, argument for argument, plus `backend`.

    Args:
        query: (..., Hq, L, D), at least two dims.
        key: (..., Hkv, S, D); Hkv may differ from Hq only with `enable_gqa`, as a divisor of it.
        value: (..., Hkv, S, Dv).
        attn_mask: bool (True = attend) or float (added) tensor broadcastable to (..., Hq, L, S).
        dropout_p: as in `attention`.
        is_causal: query i sees keys j <= i; not together with `attn_mask`.
        scale: as in `attention`.
        enable_gqa: allow fewer key heads than query heads.
        backend: as in `attention`.

    Returns:
        (..., Hq, L, Dv) in the query's dtype.

    Raises:
        RuntimeError: what PyTorch's function refuses, in one clear sentence; a forced backend that cannot run the call.
        TypeError: an argument that is no tensor. ValueError: an unknown backend, a number out of range.
    """
    plain, is_causal = None, bool(is_causal)
    if attn_mask is None and dropout_p == 0.0:
        plain = planner.plain_key(query, key, value, is_causal, scale, enable_gqa, backend)
        known = planner.recall(plain)
        if known is not None:
            return _again(known, query, key, value, is_causal, scale)[0]
    _check_tensors(query, key, value, attn_mask)
    mask = masks.CAUSAL if is_causal else None
    if is_causal and attn_mask is not None:
        raise RuntimeError("attn_mask and is_causal=True exclude each other; put the causal mask into attn_mask")
    lead = None
    if not _is_four_dims(query, key, value, enable_gqa):
        query, key, value, attn_mask, lead = _four_dims(query, key, value, attn_mask, enable_gqa)
    try:
        if attn_mask is not None:
            mask = masks.dense(attn_mask)
        x = checked(query, key, value, mask, None, None, dropout_p, scale, None, ("query", "key", "value"))
    except (TypeError, ValueError) as error:  # what PyTorch raises for a tensor or a number that does not fit
        raise RuntimeError(str(error)) from None
    out = run(x, False, "", backend, key=plain if lead is None else None)[0]
    return out if lead is None else out.reshape(*lead, *out.shape[-2:])


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> None:
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        kinds = ", ".join(type(t).__name__ for t in (query, key, value))
        raise TypeError(f"query, key, value are {kinds}; give tensors")
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask is {type(attn_mask).__name__}; give a bool or float tensor, or None")
    if query.is_nested or key.is_nested or value.is_nested:
        raise RuntimeError("query, key or value is a nested tensor; pad it, or pack it and call attn.varlen_attention")


def _is_four_dims(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether nothing has to be broadcast or folded."""
    q, k, v = query.shape, key.shape, value.shape
    same = len(q) == 4 == len(k) == len(v) and q[0] == k[0] == v[0] and k[1] == v[1]
    return same and (enable_gqa or q[1] == k[1])


def _four_dims(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, torch.Size]:
    """The tensors as (B, heads, length, head_dim), leading dims broadcast as PyTorch does and folded into B, and the
    leading dims of the result."""
    tensors = (query, key, value)
    if min(t.dim() for t in tensors) < 2:
        raise RuntimeError(f"query, key and value need at least 2 dims, got {[tuple(t.shape) for t in tensors]}")
    last = 3 if enable_gqa and min(t.dim() for t in tensors) > 2 else 2  # grouped heads do not broadcast
    try:
        lead = torch.broadcast_shapes(*(t.shape[:-last] for t in tensors))  # type: ignore[no-untyped-call]
    except RuntimeError:
        cure = "" if enable_gqa else " (fewer key heads than query heads need enable_gqa=True)"
        raise RuntimeError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}: "
            f"their leading dims do not broadcast{cure}"
        ) from None
    wide = [t.expand(*lead, *t.shape[-last:]) for t in tensors]
    dims, result = wide[0].dim(), wide[0].shape[:-2]
    if dims < 4:
        wide = [t[(None,) * (4 - dims)] for t in wide]
    else:
        if attn_mask is not None and attn_mask.dim() > 3 and dims > 4:
            attn_mask = attn_mask.expand(*result[:-1], *attn_mask.shape[-3:]).flatten(0, -4)
        wide = [t.flatten(0, -4) for t in wide]
    return wide[0], wide[1], wide[2], attn_mask, result


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    weights: str = "",
    backend: str | None = None,
    default_backend: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`attention` for modules: (out, lse or None, weights or None).

    `weights` is "", "mean" for (B, L, S) averaged over the heads or "heads" for (B, Hq, L, S): probabilities after
    dropout in q's dtype, differentiable. `default_backend` yields to `use_backend`, `backend` does not.
    """
    plain = None
    if bias is None and alibi_slopes is None and softcap is None and dropout_p == 0.0:
        causal = mask is masks.CAUSAL
        if causal or mask is None:
            plain = planner.plain_key(q, k, v, causal, scale, return_lse, weights, backend, default_backend)
            known = planner.recall(plain)
            if known is not None:
                return _again(known, q, k, v, causal, scale)
    x = checked(q, k, v, mask, bias, alibi_slopes, dropout_p, scale, softcap)
    return run(x, return_lse, weights, backend, default_backend, plain)


def run(
    x: Operands,
    return_lse: bool = False,
    weights: str = "",
    backend: str | None = None,
    default: str | None = None,
    key: tuple[Any, ...] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, lse or None, weights or None) of checked operands, by the backend that the planner chooses.

    `key` is that of a plain call, under which the choice is remembered.
    """
    spec = spec_of(x, return_lse, weights)
    chosen = planner.choose(spec, backend, default)
    if spec.dropout:
        x = x._replace(rng=rng.draw(x.q.device))  # after all that may raise: a refused call draws nothing
    if key is not None:
        planner.remember(key, spec, chosen)
    return _execute(x, spec, chosen)


def _again(
    known: tuple[AttentionSpec, Backend], q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A plain call that was checked and planned before."""
    spec, chosen = known
    factor = spec.head_dim**-0.5 if scale is None else float(scale)
    return _execute(Operands(q, k, v, right=0 if causal else UNBOUNDED, scale=factor), spec, chosen, plain=True)


def _execute(
    x: Operands, spec: AttentionSpec, chosen: Backend, plain: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if forward_ad._current_level >= 0:  # forward-mode derivatives: before anything looks at requires_grad
        return _from_reference(x, spec)
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace records plain operations only
        return _from_reference(x, spec)
    if not chosen.whole_call:
        return ops.attention(x, spec.weights, chosen.name, spec.lse, spec.grad, spec.bias_grad)
    if ops.functorch_active():  # PyTorch's fused kernels have no batching rule and no second derivative
        return _from_reference(x, spec)
    out = chosen.call(spec, x)
    return ops.twice_differentiable(out, x, plain) if spec.grad else out, None, None


def _from_reference(x: Operands, spec: AttentionSpec) -> tuple[Tensor, Tensor | None, Tensor | None]:
    out, lse, w = reference.attend(x, spec.weights)
    return out, lse if spec.lse else None, w


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    weights: str = "",
    backend: str | None = None,
) -> Explanation:
    """What the planner would do with `attention(q, k, v, ...)`: `.chosen`, `.reasons`, and a table when printed.

    Nothing runs. Raises what `attention` raises for its arguments; a forced backend that cannot run the call raises
    nothing here: `.chosen` is None and its reason says why.
    """
    if weights not in ("", "mean", "heads"):
        raise ValueError(f"weights is {weights!r}; use '', 'mean' or 'heads'")
    x = checked(q, k, v, mask, bias, alibi_slopes, dropout_p, scale, softcap)
    return planner.explain_spec(spec_of(x, return_lse, weights), backend)
