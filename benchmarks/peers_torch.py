"""PyTorch's own attention: the kernels of `F.scaled_dot_product_attention`, and FlexAttention."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from attn.benchmarks.problem import Absent, Call, Problem, dense_mask
from attn.spec import UNBOUNDED, DecodeOperands, Operands


def sdpa(p: Problem) -> Call:
    """F.scaled_dot_product_attention, its mask made beforehand; packed sequences one after another."""
    x = p.x
    if p.spec.softcap:
        raise Absent("has no softcap")
    if isinstance(x, DecodeOperands):
        if x.block_table is not None:
            raise Absent("has no paged cache")
        x = _as_attention(x)
    if x.cu_seqlens_q is not None:
        return _one_by_one(p, x)
    options = {"scale": x.scale, "enable_gqa": p.spec.grouped}
    only_causal = x._replace(left=UNBOUNDED, right=UNBOUNDED, bias=None, alibi_slopes=None)
    plain = p.spec.op == "attention" and not only_causal.hides and x.bias is None and x.alibi_slopes is None
    if plain and p.spec.causal and (p.spec.band == "start" or x.q.shape[2] == x.k.shape[2]):
        return functools.partial(F.scaled_dot_product_attention, x.q, x.k, x.v, is_causal=True, **options)
    mask = dense_mask(x)
    if mask is not None and mask.requires_grad and mask is not x.bias:
        raise Absent("takes one mask: joining it from a bias with gradient would be part of each call")
    return functools.partial(F.scaled_dot_product_attention, x.q, x.k, x.v, mask, **options)


def _as_attention(x: DecodeOperands) -> Operands:
    band = {"left": x.left, "right": x.right, "end": True} if x.q.shape[2] > 1 or x.left != UNBOUNDED else {}
    return Operands(x.q, x.k_cache, x.v_cache, key_lengths=x.lengths, scale=x.scale, **band)


def _one_by_one(p: Problem, x: Operands) -> Call:
    if p.spec.alibi or (p.spec.band and not p.spec.causal):
        raise Absent("packed sequences with a window or ALiBi would need a mask for each")
    at_q, at_k = (t.tolist() for t in (x.cu_seqlens_q, x.cu_seqlens_k))  # type: ignore[union-attr]
    if p.spec.causal and p.spec.band == "end" and at_q != at_k:
        raise Absent("is_causal means the start, and these sequences have other keys than queries")
    spans = [(slice(*q), slice(*k)) for q, k in zip(_pairs(at_q), _pairs(at_k), strict=True) if q[0] < q[1]]
    rest = x.q.shape[2] - at_q[-1]
    options = {"is_causal": p.spec.causal, "scale": x.scale, "enable_gqa": p.spec.grouped}

    def run() -> Tensor:
        parts = [F.scaled_dot_product_attention(x.q[:, :, q], x.k[:, :, k], x.v[:, :, k], **options) for q, k in spans]
        padding = x.q.new_zeros(*x.q.shape[:2], rest, x.v.shape[3])
        return torch.cat([*parts, padding], 2)

    return run


def _pairs(bounds: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(bounds))


def flex(p: Problem) -> Call:
    """FlexAttention, compiled; its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    x = p.x
    if not isinstance(x, Operands) or x.cu_seqlens_q is not None:
        raise Absent("takes batches of one length (packed calls would be document masks)")
    if p.spec.grad and p.spec.device == "cpu":
        raise Absent("has no backward pass on a CPU")
    if any(getattr(p.spec, name) for name in ("softcap", "bias_grad", "prefix", "query_lengths")):
        raise Absent("softcap, prefixes, query lengths and a bias with gradient are not compared")
    B, H, L, _ = x.q.shape
    S = x.k.shape[2]
    block_mask = create_block_mask(_visible(x, L, S), B, H, L, S, x.q.device.type) if x.hides else None
    score = _biased(x, L, S) if x.bias is not None or x.alibi_slopes is not None else None
    torch.compiler.reset()  # after eight shapes it would no longer compile, and fall back to something slow
    run = torch.compile(flex_attention)
    return lambda: run(x.q, x.k, x.v, score, block_mask, scale=x.scale, enable_gqa=p.spec.grouped)  # type: ignore[no-any-return]


def _visible(x: Operands, L: int, S: int) -> Callable[..., Tensor]:
    """The mask as a function of positions, as FlexAttention wants it."""
    off = S - L if x.end else 0
    keep = None if x.keep is None else x.keep.expand(x.q.shape[0], x.q.shape[1], L, S)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j >= 0
        if x.left != UNBOUNDED:
            seen = seen & (j >= i + off - x.left)
        if x.right != UNBOUNDED:
            seen = seen & (j <= i + off + x.right)
        if x.key_lengths is not None:
            seen = seen & (j < x.key_lengths[b])
        if x.ids_q is not None and x.ids_k is not None:
            seen = seen & (x.ids_q[b, i] == x.ids_k[b, j])
        return seen if keep is None else seen & keep[b, h, i, j]

    return visible


def _biased(x: Operands, L: int, S: int) -> Callable[..., Tensor]:
    """The score with what is added to it."""
    bias = None if x.bias is None else x.bias.expand(x.q.shape[0], x.q.shape[1], L, S)

    def biased(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if x.alibi_slopes is not None:
            s = s - x.alibi_slopes[b, h] * (i + S - L - j).abs()
        return s if bias is None else s + bias[b, h, i, j]

    return biased
