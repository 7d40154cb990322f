"""From the arguments of a public call to `Operands`: everything is checked here, once."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from attn import masks
from attn.masks import Mask
from attn.spec import UNBOUNDED, AttentionSpec, Operands, arch_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
QKV = ("q", "k", "v")


def checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
    names: tuple[str, str, str] = QKV,
) -> Operands:
    """The operands of a call on (B, H, L, D) tensors, q, k and v cast under autocast, the dropout seed not yet drawn.

    Raises TypeError for a wrong kind or dtype and ValueError for a wrong shape, device or number.
    """
    check_qkv(q, k, v, names)
    B, H, _, D = q.shape
    Bk, Hkv, S, _ = k.shape
    if Bk != B or (B, Hkv, S) != v.shape[:3]:
        raise ValueError(
            f"{_shapes(q, k, v, names)}: batch sizes (dim 0) must be equal, and key and value must agree in heads "
            "(dim 1) and length (dim 2)"
        )
    if Hkv != H and (Hkv == 0 or H % Hkv):
        raise ValueError(f"{_shapes(q, k, v, names)}: query heads ({H}) must be a multiple of key heads ({Hkv})")
    if torch._C._is_any_autocast_enabled():
        q, k, v = cast_under_autocast(q, k, v)
    check_dtype(q, k, v, names)
    scale = scale_of(scale, D)
    cap = 0.0 if softcap is None else softcap_of(softcap)
    if dropout_p != 0.0:
        check_dropout(dropout_p)
    if mask is None and bias is None and alibi_slopes is None:
        return Operands(q, k, v, scale=scale, softcap=cap, dropout_p=dropout_p)
    if bias is not None:
        bias = _four_dims("bias", bias, q, S, floating=True)
    if alibi_slopes is not None:
        alibi_slopes = slopes_of(alibi_slopes, B, H, q.device)
    x = Operands(q, k, v, bias, alibi_slopes=alibi_slopes, scale=scale, softcap=cap, dropout_p=dropout_p)
    return x if mask is None else _with_mask(x, mask)


def spec_of(x: Operands, lse: bool = False, weights: str = "") -> AttentionSpec:
    """The static description of a call; every field an int, a bool or a string, nothing symbolic."""
    q, k, v, bias, keep, slopes, key_lengths, query_lengths, ids_q, _, prefix, packed, _, _, left, right, end, *_ = x
    bias_grad = bias is not None and bias.requires_grad
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or bias_grad)
    if torch._C._are_functorch_transforms_active() and torch.is_grad_enabled():
        grad, bias_grad = True, bias is not None  # under vmap, requires_grad of what is wrapped does not show
    device = q.device
    kind = device.type
    _, heads, _, head_dim = q.shape
    _, kv_heads, _, value_dim = v.shape
    grouped = False
    if heads != kv_heads:  # not bool(...): Dynamo would keep that symbolic
        grouped = True
    band = ""
    if left != UNBOUNDED or right != UNBOUNDED:
        band = "end" if end else "start"
    return AttentionSpec(
        "attention" if packed is None else "varlen",
        kind,
        q.dtype,
        "" if kind != "cuda" else arch(device),
        int(head_dim),
        int(value_dim),
        grouped,
        band,
        bool(band and left == UNBOUNDED and right == 0 and prefix is None),
        prefix is not None,
        key_lengths is not None,
        query_lengths is not None,
        ids_q is not None,
        keep is not None,
        bias is not None,
        bool(grad and bias_grad),
        slopes is not None,
        bool(x.softcap > 0),
        bool(x.scale > 0),
        bool(x.dropout_p > 0),
        False,
        lse,
        weights,
        bool(grad),
        bool(grad and torch.are_deterministic_algorithms_enabled()),
    )


def arch(device: torch.device) -> str:
    """The architecture of a GPU, "" off the GPU."""
    if torch.compiler.is_compiling():  # Dynamo looks through a cached function and warns
        return str(arch_of.__wrapped__(device.type, device.index))
    return arch_of(device.type, device.index)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str], dims: int = 4) -> None:
    """Kinds, number of dims, head dims and devices of query, key and value."""
    plain = isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
    if (
        not plain
        or not (q.dim() == k.dim() == v.dim() == dims)
        or not (q.layout is k.layout is v.layout is torch.strided)
        or (q.is_nested or k.is_nested or v.is_nested)
    ):
        for name, t in zip(names, (q, k, v), strict=True):
            _refuse(name, t, dims)
    head_dim = q.size(-1)
    if head_dim != k.size(-1) or head_dim == 0 or v.size(-1) == 0:
        raise ValueError(f"{_shapes(q, k, v, names)}: query and key must share a head_dim >= 1, value have one >= 1")
    device = q.device
    if k.device != device or v.device != device:
        raise ValueError(
            f"{names[0]} is on {device}, {names[1]} on {k.device}, {names[2]} on {v.device}; use one device"
        )


def _refuse(name: str, t: Tensor, dims: int) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} is {type(t).__name__}; give a tensor")
    if t.is_nested or t.layout is not torch.strided:
        raise ValueError(f"{name} is a nested or sparse tensor; pad it, or pack it and call attn.varlen_attention")
    if t.dim() != dims:
        wanted = "(B, heads, length, head_dim)" if dims == 4 else "(tokens, heads, head_dim)"
        raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be {wanted}")


def autocast_is_on(kind: str) -> bool:
    """Whether autocast is on for a device type; the meta device knows none."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def cast_under_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in autocast's dtype where it is on; masks, biases and slopes stay as they are."""
    kind = q.device.type
    if not autocast_is_on(kind) or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def check_dtype(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str]) -> None:
    """One floating dtype for all three."""
    dtype = q.dtype
    if dtype not in DTYPES:
        raise TypeError(f"{names[0]} is {dtype}; give float32, bfloat16, float16 or float64")
    if k.dtype is not dtype or v.dtype is not dtype:
        raise TypeError(f"{names[0]} is {q.dtype}, {names[1]} {k.dtype}, {names[2]} {v.dtype}; use one dtype")


def check_dropout(dropout_p: float) -> None:
    """A probability, NaN refused."""
    if not isinstance(dropout_p, (int, float, torch.SymFloat)):
        raise TypeError(f"dropout_p is {type(dropout_p).__name__}; give a float in [0, 1]")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; it must be in [0, 1]")


def scale_of(scale: float | None, head_dim: int) -> float:
    """The factor of the scores, checked; 1 / sqrt(head_dim) by default."""
    if scale is None:
        return float(int(head_dim) ** -0.5)
    if not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"scale is {type(scale).__name__}; give a float, or None for 1 / sqrt(head_dim)")
    if isinstance(scale, (int, float)) and not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be finite")
    return scale if isinstance(scale, (float, torch.SymFloat)) else float(scale)


def softcap_of(softcap: float) -> float:
    """The cap of the scores, checked."""
    if not isinstance(softcap, (int, float, torch.SymFloat)):
        raise TypeError(f"softcap is {type(softcap).__name__}; give a float > 0, or None")
    if not softcap > 0 or (isinstance(softcap, float) and math.isinf(softcap)):
        raise ValueError(f"softcap is {softcap}; it must be > 0 and finite, or None for none")
    return softcap


def slopes_of(slopes: Tensor, B: int, H: int, device: torch.device) -> Tensor:
    """ALiBi slopes (Hq,) or (B, Hq) as float32 (B, Hq)."""
    if not isinstance(slopes, Tensor) or not slopes.is_floating_point():
        raise TypeError(f"alibi_slopes is {_kind(slopes)}; give a float32 tensor of shape (Hq,) or (B, Hq)")
    if tuple(slopes.shape) not in ((H,), (B, H)):
        raise ValueError(f"alibi_slopes has shape {tuple(slopes.shape)}; it must be ({H},) or ({B}, {H})")
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes requires grad and gets none; detach it, or pass the learned term as bias")
    _same_device("alibi_slopes", slopes, device)
    return slopes.to(torch.float32).expand(B, H)


def values_known(t: Tensor) -> bool:
    """Whether numbers inside t may be looked at: an ordinary CPU tensor in eager mode, or ATTN_CHECK=1."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if type(t) is not Tensor or t.is_meta or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return t.device.type == "cpu" or os.environ.get("ATTN_CHECK") == "1"


def check_range(name: str, t: Tensor, low: int, high: int | None) -> None:
    """Every number of an integer tensor in [low, high]; the first offender is named by its index."""
    if t.numel() == 0 or not values_known(t):
        return
    least, most = torch.aminmax(t)
    if int(least) >= low and (high is None or int(most) <= high):
        return
    bad = (t < low) if high is None else (t < low) | (t > high)
    index = bad.nonzero()[0].tolist()
    where = ", ".join(map(str, index))
    limits = f">= {low}" if high is None else f"in [{low}, {high}]"
    raise ValueError(f"{name}[{where}] is {int(t[tuple(index)])}; it must be {limits}")


def _with_mask(x: Operands, mask: Mask) -> Operands:
    if not isinstance(mask, Mask):
        cure = "wrap a tensor in attn.masks.dense(...)" if isinstance(mask, Tensor) else "see attn.masks"
        raise TypeError(f"mask is {type(mask).__name__}; give what attn.masks makes ({cure})")
    B, _, L, _ = x.q.shape
    S = x.k.shape[2]
    band = {} if mask.band is None else band_fields(mask, B, x.q.device)
    bias, keep = x.bias, None
    if mask.dense is not None:
        dense = _four_dims("masks.dense", mask.dense, x.q, S)
        if dense.dtype == torch.bool:
            keep = dense
        else:
            bias = dense if bias is None else _sum(bias, dense)
    x = x._replace(
        bias=bias,
        keep=keep,
        key_lengths=_per_batch("masks.padding lengths", mask.key_lengths, B, S, x.q.device),
        query_lengths=_per_batch("masks.padding query_lengths", mask.query_lengths, B, L, x.q.device),
        ids_q=_ids("ids_q", mask.ids_q, B, L, x.q.device),
        ids_k=_ids("ids_k", mask.ids_k, B, S, x.q.device),
        **band,
    )
    for other in mask.also:
        alone = Operands(x.q, x.k, x.v, key_lengths=x.key_lengths, query_lengths=x.query_lengths)
        alone = alone._replace(**band_fields(other, B, x.q.device))
        seen = masks.visibility(alone, L, S)
        x = x._replace(keep=seen if x.keep is None or seen is None else x.keep & seen)
    return x


def band_fields(mask: Mask, B: int, device: torch.device) -> dict[str, Any]:
    """The operands of a mask's band and prefix."""
    band = mask.band
    if band is None:
        return {}
    left = UNBOUNDED if band.left is None else band.left
    right = UNBOUNDED if band.right is None else band.right
    if left == UNBOUNDED and right == UNBOUNDED:  # everyone sees everyone
        return {}
    prefix = mask.prefix
    if prefix is not None:
        if prefix.shape[0] not in (1, B):
            raise ValueError(f"prefix_lm n has shape {tuple(prefix.shape)}; it must be ({B},)")
        if prefix.shape[0] == B and B != 1:
            _same_device("prefix_lm n", prefix, device)
        prefix = prefix.to(device).expand(B).contiguous()
        check_range("prefix_lm n", prefix, 0, None)
    return {"left": left, "right": right, "end": band.anchor == "end", "prefix": prefix}


def _per_batch(name: str, t: Tensor | None, B: int, high: int, device: torch.device) -> Tensor | None:
    if t is None:
        return None
    if t.shape[0] != B:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be ({B},)")
    _same_device(name, t, device)
    check_range(name, t, 0, high)
    return t


def _ids(name: str, t: Tensor | None, B: int, length: int, device: torch.device) -> Tensor | None:
    if t is None:
        return None
    if t.shape[0] != B or t.shape[1] != length:
        cure = "; where queries and keys differ in number give a pair (ids_q, ids_k)"
        raise ValueError(f"masks.documents {name} has shape {tuple(t.shape)}; it must be ({B}, {length}){cure}")
    _same_device(f"masks.documents {name}", t, device)
    return t


def _four_dims(name: str, t: Tensor, q: Tensor, S: int, floating: bool = False) -> Tensor:
    """t as a 4-D view, each of its dims 1 or that of (B, Hq, L, S)."""
    if not isinstance(t, Tensor) or (floating and not t.is_floating_point()):
        raise TypeError(f"{name} is {_kind(t)}; give a float tensor (a bool mask goes into attn.masks.dense)")
    if t.layout is not torch.strided or t.is_nested:
        raise ValueError(f"{name} is a nested or sparse tensor; give a dense one")
    full = (q.shape[0], q.shape[1], q.shape[2], S)
    shape = t.shape
    fits = len(shape) <= 4 and all(n in (1, m) for n, m in zip(reversed(shape), reversed(full), strict=False))
    if not fits:
        raise ValueError(f"{name} has shape {tuple(shape)}; it must broadcast to (B, Hq, L, S) = {tuple(full)}")
    _same_device(name, t, q.device)
    return t[(None,) * (4 - len(shape))] if len(shape) < 4 else t


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two biases in at least float32."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype) + b.to(dtype)


def _same_device(name: str, t: Tensor, device: torch.device) -> None:
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}, the query on {device}; move it there")


def _kind(t: object) -> str:
    return str(t.dtype) if isinstance(t, Tensor) else type(t).__name__


def _shapes(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str]) -> str:
    return ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(names, (q, k, v), strict=True))
