"""What `attn.MultiheadAttention` refuses, with PyTorch's exception types."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attn import masks
from attn.backends import load
from attn.operands import autocast_is_on
from attn.rotary import Rotary

if TYPE_CHECKING:
    from attn.module import MultiheadAttention

MASKED_ROWS = ("zero", "nan")


def check_settings(backend: str | None, masked_rows: str) -> None:
    """Raise ValueError for an unknown backend or treatment of masked rows."""
    if backend is not None:
        load(backend)
    if masked_rows not in MASKED_ROWS:
        raise ValueError(f"masked_rows is {masked_rows!r}; use 'zero' or 'nan'")


def check_extras(num_heads: int, head_dim: int, num_kv_heads: int | None, window: object, rotary: object) -> None:
    """Raise TypeError or ValueError for the constructor's own arguments."""
    if num_kv_heads is not None:
        if isinstance(num_kv_heads, bool) or not isinstance(num_kv_heads, int):
            raise TypeError(f"num_kv_heads is {num_kv_heads!r}; give an int that divides num_heads={num_heads}")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads is {num_kv_heads}; it must divide num_heads={num_heads}")
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise TypeError(f"window is {window!r}; give (left, right), None in a place for no limit")
        masks.window(*window)
    if rotary is not None:
        if not isinstance(rotary, Rotary):
            raise TypeError(f"rotary is {type(rotary).__name__}; give attn.Rotary(dim)")
        if rotary.dim > head_dim:
            raise ValueError(f"rotary.dim is {rotary.dim}; a head has {head_dim} features only")


def check_tensors(query: object, key: object, value: object) -> None:
    """Raise TypeError for what is no tensor."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} is {type(t).__name__}; give a tensor")


def check_shapes(module: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise AssertionError, and RuntimeError for batch sizes, where query, key and value do not fit."""
    dims = query.dim()
    if dims != 3 and dims != 2:
        raise AssertionError(
            f"query should be unbatched 2D or batched 3D tensor but received {dims}-D query tensor "
            f"of shape {tuple(query.shape)}"
        )
    if query.shape[-1] != module.embed_dim:
        raise AssertionError(
            f"query: was expecting embedding dimension of {module.embed_dim}, but got {query.shape[-1]}"
        )
    if key is query and value is query:
        return
    if key.dim() != dims or value.dim() != dims:
        raise AssertionError(
            f"query is {dims}-D, so key and value must be too, but they are {key.dim()}-D and {value.dim()}-D"
        )
    packed = module._qkv_same_embed_dim
    if key.shape != value.shape and (packed or key.shape[:-1] != value.shape[:-1]):
        raise AssertionError(
            f"key shape {tuple(key.shape)} does not match value shape {tuple(value.shape)}"
            + ("" if packed else " in length and batch")
        )
    if dims == 3:
        batch = 0 if module.batch_first else 1
        if key.shape[batch] != query.shape[batch]:
            raise RuntimeError(
                f"key has batch size {key.shape[batch]} in shape {tuple(key.shape)}, query {query.shape[batch]} in "
                f"shape {tuple(query.shape)}; they must be equal"
            )


def check_mask_kinds(
    query: Tensor, key: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, num_heads: int
) -> None:
    """Raise AssertionError for masks of the wrong dtype or number of dims, TypeError for what is no tensor."""
    batched = query.dim() == 3
    for name, mask, allowed in (
        ("key_padding_mask", key_padding_mask, (2,) if batched else (1,)),
        ("attn_mask", attn_mask, (2, 3)),
    ):
        if mask is None:
            continue
        if not isinstance(mask, Tensor):
            raise TypeError(f"{name} is {type(mask).__name__}; give a bool or float tensor, or None")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(
                f"only bool and floating types of {name} are supported, got {mask.dtype}; "
                f"give {name}.bool() if 1 means hidden"
            )
        if mask.dim() not in allowed:
            right = " or ".join(f"{n}-D" for n in allowed)
            raise AssertionError(
                f"{name} must be {right} for a {query.dim()}-D query, but it is {mask.dim()}-D "
                f"with shape {tuple(mask.shape)}"
            )
        if mask.device != query.device:
            raise RuntimeError(f"{name} is on {mask.device}, query on {query.device}; move it there")
    if not batched and attn_mask is not None and attn_mask.dim() == 3:
        right_shape = (num_heads, query.shape[0], key.shape[0])
        if attn_mask.shape != right_shape:
            raise AssertionError(f"Expected `attn_mask` shape to be {right_shape} but got {tuple(attn_mask.shape)}")


def check_mask_sizes(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, sizes: tuple[int, int, int, int]
) -> None:
    """Raise RuntimeError for an attn_mask and AssertionError for a key_padding_mask of the wrong size."""
    B, H, L, S = sizes
    if attn_mask is not None:
        right = (L, S) if attn_mask.dim() == 2 else (B * H, L, S)
        if attn_mask.shape != right:
            raise RuntimeError(
                f"The shape of the {attn_mask.dim()}D attn_mask is {tuple(attn_mask.shape)}, but should be {right}"
            )
    if key_padding_mask is not None and key_padding_mask.shape != (B, S):
        raise AssertionError(
            f"key_padding_mask has shape {tuple(key_padding_mask.shape)}, but should be ({B}, {S}): "
            "a row per sequence, a column per key"
        )


def check_weight(name: str, x: Tensor, weight: Tensor, packed: bool = True) -> None:
    """Raise where input `name` cannot be multiplied by its projection weight: RuntimeError; AssertionError for the
    features of a separate projection, as PyTorch does."""
    if x.shape[-1] != weight.shape[1]:
        kind = RuntimeError if packed else AssertionError
        raise kind(
            f"{name} has {x.shape[-1]} features in shape {tuple(x.shape)}, its projection takes {weight.shape[1]}"
        )
    if x.device != weight.device:
        raise RuntimeError(f"{name} is on {x.device}, the module's parameters on {weight.device}; use one device")
    if x.dtype != weight.dtype and not autocast_is_on(x.device.type):
        raise RuntimeError(f"{name} is {x.dtype}, the module's parameters {weight.dtype}; convert one, or use autocast")


def check_nested(module: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, masked: bool) -> None:
    """Raise AssertionError, as PyTorch does, for nested tensors in a call that cannot take them."""
    cure = "pad it and give a key_padding_mask"
    if query.layout == torch.jagged or key.layout == torch.jagged or value.layout == torch.jagged:
        raise AssertionError(
            "MultiheadAttention does not support NestedTensor of layout torch.jagged; "
            f"use layout torch.strided, or {cure}"
        )
    if not (query is key and key is value and module.batch_first):
        raise AssertionError(
            "MultiheadAttention supports NestedTensor for self-attention only, query, key and value the same tensor "
            f"and batch_first=True; otherwise {cure}"
        )
    if module.bias_k is not None or module.add_zero_attn:
        raise AssertionError(
            f"MultiheadAttention with add_bias_kv or add_zero_attn does not support NestedTensor; {cure}"
        )
    if masked:
        raise AssertionError(
            "MultiheadAttention takes no attn_mask and no key_padding_mask with a NestedTensor, "
            f"whose lengths say what is padding; otherwise {cure}"
        )
