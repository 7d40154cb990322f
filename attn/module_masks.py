"""From the masks of `nn.MultiheadAttention` to those of `attn.masks`, with what lets blocks be skipped recognised.

There True hides and a float is added; here True shows. PyTorch's own layers turn every bool mask into a float one of 0
and -inf before a module sees it: on ordinary CPU tensors such a mask becomes bool again, a causal one a band, a padding
at the end lengths. That is decided anew at each call: a few small operations, and nothing that could go stale when a
mask changes behind torch's back. Where looking would synchronise a GPU or break a trace, masks stay dense.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from attn import masks
from attn.masks import CAUSAL, Mask
from attn.operands import autocast_is_on, values_known

Window = tuple[int | None, int | None]


def merged(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    sizes: tuple[int, int, int, int],
    extra: int,
) -> tuple[Mask | None, Tensor | None]:
    """(mask, bias) of a call. `sizes` is (B, H, L, S) without the `extra` keys, which every query sees."""
    mask, bias = None, None
    if attn_mask is not None:
        mask, bias = _of_attn_mask(attn_mask, sizes, extra)
    if key_padding_mask is not None:
        other, more = _of_padding(key_padding_mask, sizes[3], extra)
        mask = both(mask, other)
        bias = more if bias is None else bias if more is None else bias + more
    return mask, bias


def windowed(window: Window, L: int, S: int, extra: int, device: torch.device) -> Mask:
    """The module's own window, anchored at the start; the `extra` last keys lie outside of it and are seen."""
    band = masks.window(*window)
    if not extra:
        return band
    left, right = window
    distance = torch.arange(S, device=device) - torch.arange(L, device=device)[:, None]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        seen = seen & (distance >= -left)
    if right is not None:
        seen = seen & (distance <= right)
    return masks.dense(F.pad(seen, (0, extra), value=True))


def both(a: Mask | None, b: Mask | None) -> Mask | None:
    """a & b, where None hides nothing."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


def check_dtypes(attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor, need_weights: bool) -> None:
    """Warn, as PyTorch does, where a bool and a float mask meet.

    Raises RuntimeError for a float mask whose dtype is not the query's: float32 may stand beside any query without
    weights, as in PyTorch, and autocast casts.
    """
    given = [t for t in (attn_mask, key_padding_mask) if t is not None]
    if len(given) == 2 and given[0].dtype != given[1].dtype:
        warnings.warn(
            f"Support for mismatched key_padding_mask ({given[1].dtype}) and attn_mask ({given[0].dtype}) is "
            "deprecated in PyTorch; give both the same dtype",
            stacklevel=4,
        )
    kinds = [query.dtype if t.dtype == torch.bool else t.dtype for t in given]
    joint = kinds[0] if len(kinds) == 1 else torch.promote_types(*kinds)
    fits = joint == query.dtype or (joint == torch.float32 and not need_weights)
    if not fits and not autocast_is_on(query.device.type):
        names = ("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)
        got = " and ".join(f"{name} ({t.dtype})" for name, t in names if t is not None)
        raise RuntimeError(f"{got} must be bool or of the query's dtype {query.dtype}")


def _of_attn_mask(t: Tensor, sizes: tuple[int, int, int, int], extra: int) -> tuple[Mask | None, Tensor | None]:
    B, H, L, S = sizes
    if t.dim() == 3:
        t = t.reshape(B, H, L, S)
    hidden = _hidden(t)
    if hidden is None:
        return None, F.pad(t, (0, extra)) if extra else t
    if _looked_at(hidden):
        if not bool(hidden.any()):
            return None, None
        if not extra and torch.equal(hidden, _future(L, S, hidden.device).expand_as(hidden)):
            return CAUSAL, None
    return _dense(hidden, extra), None


def _of_padding(t: Tensor, S: int, extra: int) -> tuple[Mask | None, Tensor | None]:
    hidden = _hidden(t)
    if hidden is None:
        t = t[:, None, None]
        return None, F.pad(t, (0, extra)) if extra else t
    if _looked_at(hidden):
        lengths = S - hidden.sum(1)
        if bool((lengths == S).all()):
            return None, None
        if not extra and torch.equal(hidden, torch.arange(S, device=t.device) >= lengths[:, None]):
            return masks.padding(lengths), None
    return _dense(hidden[:, None, None], extra), None


def _hidden(t: Tensor) -> Tensor | None:
    """What a mask hides as bool, or None where it has to be added to the scores."""
    if t.dtype == torch.bool:
        return t
    if t.requires_grad or not _looked_at(t):
        return None
    hidden = t == -torch.inf
    return hidden if bool(((t == 0) | hidden).all()) else None


def _looked_at(t: Tensor) -> bool:
    """Whether the numbers in t may decide: an ordinary CPU tensor in eager mode, and no trace is recorded."""
    return t.device.type == "cpu" and values_known(t) and torch._C._get_tracing_state() is None


def _future(L: int, S: int, device: torch.device) -> Tensor:
    return torch.ones(L, S, dtype=torch.bool, device=device).triu_(1)


def _dense(hidden: Tensor, extra: int) -> Mask:
    seen = ~hidden
    return masks.dense(F.pad(seen, (0, extra), value=True) if extra else seen)
