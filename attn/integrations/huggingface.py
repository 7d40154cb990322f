"""Hugging Face transformers: `attn_implementation="attn"`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn import masks
from attn.functional import attend
from attn.masks import Mask
from attn.module_masks import merged

NAME = "attn"
_ABOUT_THE_MODEL = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
"""Keywords that reach an attention function on their way through a model and ask nothing of it."""


def register_transformers(name: str = NAME) -> None:
    """Register our attention with transformers, for `attn_implementation="attn"` and `model.set_attn_implementation`.

    Grouped-query heads, softcap, sliding windows, position biases (with gradient), attention sinks (with gradient) and
    `output_attentions` work; masks are those that transformers makes for its own `sdpa`. A keyword that is not known
    raises: none is dropped.

    Args:
        name: under which transformers shall know it.

    Raises ImportError without a transformers that has attention interfaces (4.53 or newer).
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError("register_transformers needs transformers >= 4.53: pip install transformers") from error
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in place of its own attention functions.

    Args:
        module: the attention module; its `is_causal` holds where the argument is None.
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D), not repeated for grouped-query attention.
        value: (B, Hkv, S, Dv).
        attention_mask: bool (True = attend) or float (added), broadcastable to (B, Hq, L, S), or None.
        dropout: probability.
        scaling: factor of the scores; None means 1 / sqrt(D).
        is_causal: without a mask, and for more than one query.
        position_bias: added to the scaled scores, broadcastable to (B, Hq, L, S).
        sliding_window: in the mask already; without one, raises where it would hide a key.
        softcap: c turns scaled scores s into c * tanh(s / c).
        s_aux: (Hq,) attention sinks, scores of one key more, without a value.
        output_attentions: return the weights.
        kwargs: what only concerns the model around, and what is None or False.

    Returns:
        out (B, L, Hq, Dv), and the weights (B, Hq, L, S) or None.

    Raises:
        TypeError: a keyword that is not known, or a mask that is no tensor. ValueError: as `attn.attention`.
    """
    _refuse_unknown(kwargs)
    L, S = query.shape[2], key.shape[2]
    mask, bias = _mask(attention_mask, query, S)
    if attention_mask is None:
        if sliding_window is not None and sliding_window < S:
            raise ValueError(
                f"sliding_window is {sliding_window} for {S} keys, and there is no attention_mask that says so; "
                'masks come from transformers\' mask interface, where "attn" is registered too'
            )
        wanted = getattr(module, "is_causal", True) if is_causal is None else is_causal
        mask = masks.CAUSAL if wanted and L > 1 else None
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    out, lse, weights = attend(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        dropout_p=dropout,
        scale=scaling,
        softcap=softcap,
        return_lse=s_aux is not None,
        weights="heads" if output_attentions else "",
    )
    if s_aux is not None and lse is not None:  # a key without a value takes its share of each row
        share = torch.sigmoid(lse - s_aux.to(lse.dtype)[:, None])[..., None]
        out = (out * share).to(out.dtype)
        weights = None if weights is None else (weights * share).to(weights.dtype)
    return out.transpose(1, 2).contiguous(), weights


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    unknown = sorted(n for n, v in kwargs.items() if v is not None and v is not False and n not in _ABOUT_THE_MODEL)
    if unknown:
        raise TypeError(
            f'attn_implementation="attn" does not know {", ".join(unknown)}, and drops nothing in silence; '
            'use attn_implementation="eager" for this model'
        )


def _mask(t: Tensor | None, query: Tensor, S: int) -> tuple[Mask | None, Tensor | None]:
    """(mask, bias) for what transformers made."""
    if t is None:
        return None, None
    if not isinstance(t, Tensor):
        raise TypeError(f"attention_mask is {type(t).__name__}; give a bool or float tensor, or None")
    if t.dtype != torch.bool:
        return None, t
    B, H, L, _ = query.shape
    rows_alike = t.dim() == 4 and tuple(t.shape) == (B, 1, L, S) and (L == 1 or t.stride(2) == 0)
    if rows_alike:  # a padding: lengths where it lies at the end
        return merged(None, ~t[:, 0, 0], (B, H, L, S), 0)
    return masks.dense(t), None
