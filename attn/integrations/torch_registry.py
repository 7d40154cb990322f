"""Our kernels as a flash-attention implementation of PyTorch's own registry.

PyTorch's `F.scaled_dot_product_attention` chooses among its kernels as always; where it takes the one called flash,
ours runs instead, below autograd. So it holds for compiled graphs too, and the residual is PyTorch's: out and lse.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention as torch_attention

from attn import masks, ops, planner, reference
from attn.operands import checked, spec_of
from attn.spec import Operands

NAME = "attn"
_CPU = "_scaled_dot_product_flash_attention_for_cpu"
_CUDA = "_scaled_dot_product_flash_attention"


def register_torch() -> None:
    """Register "attn" with PyTorch, for `torch.nn.attention.activate_flash_attention_impl("attn")`.

    Once activated, calls that PyTorch gives to its flash kernels run on ours: on a CPU those without dropout, on a GPU
    where one of our backends is proven or forced. While it is active, PyTorch's function is ours, and with it what our
    `sdpa` backend calls. `restore_flash_attention_impl()` is the way back. Not run on hardware: the part for GPUs.

    Raises RuntimeError where torch has no such registry.
    """
    register = getattr(torch_attention, "register_flash_attention_impl", None)
    if register is None or not hasattr(torch.library, "get_kernel"):
        raise RuntimeError(
            f"torch {torch.__version__} has no registry of flash attention; use attn.integrations.sdpa_override()"
        )
    register(NAME, register_fn=_Handle)


class _Handle:
    """What PyTorch keeps while ours is active: the overrides live as long as the library object."""

    def __init__(self) -> None:
        library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        kernels: list[tuple[str, str, Any, Any]] = [(_CPU, "CPU", _cpu_forward, _cpu_backward)]
        if torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
            kernels.append((_CUDA, "CUDA", _cuda_forward, _cuda_backward))
        with warnings.catch_warnings():  # torch says once that a kernel is overridden: that is what was asked for
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
            for name, key, forward, backward in kernels:
                for op, ours in ((name, forward), (f"{name}_backward", backward)):
                    run = _with_original(ours, f"aten::{op}", key)
                    library.impl(op, run, key, with_keyset=True, allow_override=True)
        self.library: Any = library

    def remove(self) -> None:
        """Give PyTorch its own kernels back."""
        self.library = None


def _with_original(ours: Any, op: str, key: str) -> Any:
    """`ours` on the op's arguments, with PyTorch's kernel as what it may fall back to."""
    original = torch.library.get_kernel(op, key)

    def run(keys: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(lambda: original.call_boxed(keys, *args, **kwargs), *args, **kwargs)

    return run


def _call(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float | None) -> Any:
    """(operands, backend), or None for PyTorch's own kernel: where only the reference could run, or sdpa is forced."""
    if planner.state.forced == "sdpa":
        return None
    seen = masks.CAUSAL if causal else None
    if mask is not None:
        dense = masks.dense(mask)
        seen = dense if seen is None else seen & dense
    q, k, v = (t.detach() for t in (q, k, v))
    x = checked(q, k, v, seen, None, None, 0.0, scale, None)
    backend = planner.choose(spec_of(x, lse=True)).name
    if backend == "reference" and planner.state.forced != backend:
        return None
    return x, backend


def _forward(x: Operands, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """out, m, l."""
    out, m, l, _ = ops.attention_forward(*x, "", backend)
    return out, m, l


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    """`t` with the strides of `empty_like(like)`, on which compiled graphs rely."""
    empty = torch.empty_like(like)
    return t if t.stride() == empty.stride() else empty.copy_(t)


def _backward(d_out: Tensor, out: Tensor, lse: Tensor, x: Operands, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    if x.bias is None:
        residuals = (out, lse.contiguous(), (lse > -torch.inf).to(lse.dtype))
    else:  # rows of finfo.min: their lse alone has lost the row's sum
        residuals = _forward(x, backend)
    dq, dk, dv, _ = ops.attention_backward(d_out, None, None, *residuals, *x, False, backend)
    return dq, dk, dv


def _cpu_forward(
    original: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    found = None if dropout_p else _call(query, key, value, is_causal, attn_mask, scale)
    if found is None:
        return original()
    out, m, l = _forward(*found)
    lse = reference.lse_of(m, l).transpose(1, 2).contiguous().transpose(1, 2)  # as compiled graphs expect it
    return _laid_out(out, query), lse


def _cpu_backward(
    original: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    found = None if dropout_p else _call(query, key, value, is_causal, attn_mask, scale)
    return original() if found is None else _backward(grad_out, out, logsumexp, *found)


def _cuda_forward(
    original: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    found = None if dropout_p or return_debug_mask else _call(query, key, value, is_causal, None, scale)
    if found is None:
        return original()
    out, m, l = _forward(*found)
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
    offset = torch.zeros((), dtype=torch.uint64, device=query.device)
    no_mask = query.new_empty(0)
    return (
        _laid_out(out, query),
        reference.lse_of(m, l),
        None,
        None,
        query.shape[2],
        key.shape[2],
        seed,
        offset,
        no_mask,
    )


def _cuda_backward(
    original: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    *rest: Any,
    scale: float | None = None,
) -> Any:
    _, _, _, _, dropout_p, is_causal, _, _ = rest  # cu_seqlens and lengths before, Philox's seed and offset after
    found = None if dropout_p else _call(query, key, value, is_causal, None, scale)
    if found is None:
        return original()
    grads = _backward(grad_out, out, logsumexp, *found)
    return tuple(_laid_out(g, t) for g, t in zip(grads, (query, key, value), strict=True))
