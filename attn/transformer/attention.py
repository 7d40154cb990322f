"""The attention of a layer: `attn.MultiheadAttention`, with positions in its scores and with a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attn import masks, planner
from attn.masks import Mask
from attn.module import MultiheadAttention
from attn.module_masks import merged, windowed
from attn.packed import decode_attention
from attn.transformer.cache import LayerCache, Memory
from attn.transformer.config import LayerConfig
from attn.transformer.position_bias import Alibi


class Attention(MultiheadAttention):
    """`attn.MultiheadAttention` as a layer holds it; called in the same way.

    Args:
        config: of the layer.
        position_bias: `Alibi`, `RelativeBias` or the like, whose result is added to the scores.
        cross: keys come from another sequence: no causal band, window, rotary or position bias.
        kdim: features of keys, of values `vdim`, where they are not `config.d_model`.
        vdim: see kdim.
    """

    def __init__(
        self,
        config: LayerConfig,
        *,
        position_bias: nn.Module | None = None,
        cross: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
    ) -> None:
        super().__init__(
            config.d_model,
            config.nhead,
            config.dropout,
            config.bias,
            kdim=kdim,
            vdim=vdim,
            batch_first=config.batch_first,
            num_kv_heads=config.num_kv_heads,
            window=None if cross else config.band,
            rotary=None if cross else config.rotary,
        )
        self.position_bias = None if cross else position_bias

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, bias: Tensor | None, wanted: str
    ) -> tuple[Tensor, Tensor | None]:
        if self.position_bias is not None:
            there: Tensor = self.position_bias(torch.arange(q.shape[2], device=q.device), k.shape[2])
            bias = there if bias is None else bias + there
        return super()._attend(q, k, v, mask, bias, wanted)

    def step(self, x: Tensor, cache: LayerCache) -> Tensor:
        """Causal self-attention of new tokens to those in the cache and to each other; they are added to it.

        Args:
            x: the new tokens, (N, L, E), or (L, N, E) without batch_first.
            cache: with room for them (`KVCache.reserve`).

        Returns the output, of x's shape. Raises ValueError for a module that is not causal, RuntimeError in training
        and where gradients would be lost.
        """
        if self.window is None or self.window[1] != 0:
            raise ValueError("step: a cache holds earlier tokens only; build the layer with causal=True")
        check_inference(self, x)
        first, positions = cache.whole.used == 0, cache.whole.positions(x.shape[1 if self.batch_first else 0])
        q, k, v = self._heads(x, x, x, not self.batch_first, positions)
        cache.write(k, v)
        if first:
            out, _ = self._attend(q, k, v, windowed(self.window, q.shape[2], k.shape[2], 0, q.device), None, "")
        elif self.position_bias is None or isinstance(self.position_bias, Alibi):
            slopes = None if self.position_bias is None else self.position_bias.slopes.float()
            found: Any = decode_attention(
                q,
                cache.k,
                cache.v,
                lengths=cache.whole.lengths + q.shape[2],
                block_table=cache.whole.block_table,
                window=self.window,
                alibi_slopes=slopes,
                backend=self.backend if planner.state.forced is None else None,
            )
            out = found  # a tensor, where no lse is asked for
        else:
            out = self._with_bias(self.position_bias, self.window[0], q, cache, positions)
        return self._projected(out)

    def remember(self, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None) -> Memory:
        """Keys and values of cross-attention, projected once for all tokens to come; the mask as in `forward`."""
        N = key.shape[0 if self.batch_first else 1]
        nobody = key.new_empty((N, 0, self.embed_dim) if self.batch_first else (0, N, self.embed_dim))
        _, k, v = self._heads(nobody, key, value, not self.batch_first)
        if key_padding_mask is not None and tuple(key_padding_mask.shape) != (N, k.shape[2]):
            shape = tuple(key_padding_mask.shape)
            raise ValueError(f"key_padding_mask has shape {shape}; it must be ({N}, {k.shape[2]})")
        return Memory(k, v, key_padding_mask)

    def recall(self, x: Tensor, memory: Memory) -> Tensor:
        """Cross-attention of x, (N, L, E), to what `remember` returned."""
        N = x.shape[0 if self.batch_first else 1]
        nothing = [
            x.new_empty((N, 0, width) if self.batch_first else (0, N, width)) for width in (self.kdim, self.vdim)
        ]
        q, _, _ = self._heads(x, nothing[0], nothing[1], not self.batch_first)
        mask, bias = merged(None, memory.padding, (*q.shape[:3], memory.k.shape[2]), 0)
        return self._projected(self._attend(q, memory.k, memory.v, mask, bias, "")[0])

    def _with_bias(
        self, position_bias: nn.Module, left: int | None, q: Tensor, cache: LayerCache, positions: Tensor
    ) -> Tensor:
        """Decoding with a bias that `attn.decode_attention` has no place for."""
        k, v = cache.contents()
        S = k.shape[2]
        distance = positions[:, None, :, None] - torch.arange(S, device=q.device)
        seen = distance >= 0
        if left is not None:
            seen = seen & (distance <= left)
        bias: Tensor = position_bias(positions, S)
        return super()._attend(q, k, v, masks.dense(seen), bias, "")[0]

    def _projected(self, out: Tensor) -> Tensor:
        """The module's output from heads (N, H, L, D)."""
        out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
        projected: Tensor = self.out_proj(out.flatten(2))
        return projected


def check_inference(module: nn.Module, x: Tensor) -> None:
    """Raise RuntimeError where a cache would give other results than the model, or lose gradients."""
    if module.training:
        raise RuntimeError("decoding with a cache has no dropout; call model.eval() first")
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters())):
        raise RuntimeError("decoding with a cache has no gradient; call it under torch.no_grad()")
