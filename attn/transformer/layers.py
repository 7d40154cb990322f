"""Encoder and decoder layer, with the parameters of `nn.TransformerEncoderLayer` and `nn.TransformerDecoderLayer`.

Their state dicts are the same, their random numbers at initialisation too, so that weights go either way.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from attn.transformer.attention import Attention
from attn.transformer.cache import LayerCache, Memory
from attn.transformer.config import LayerConfig
from attn.transformer.norms import make_norm

Pair = tuple[Tensor, Tensor]


class _Layer(nn.Module):
    """Feed-forward network, norms and residuals; the attentions are the subclasses'."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.config = config

    def _add_rest(self, norms: int) -> None:
        """Everything after the attentions, drawn in PyTorch's order."""
        c = self.config
        self.linear1 = nn.Linear(c.d_model, c.dim_feedforward, bias=c.bias)
        self.dropout = nn.Dropout(c.dropout)
        self.linear2 = nn.Linear(c.dim_feedforward, c.d_model, bias=c.bias)
        if c.activation == "swiglu":
            self.linear_gate = nn.Linear(c.d_model, c.dim_feedforward, bias=c.bias)
        for n in range(1, norms + 1):
            self.add_module(f"norm{n}", make_norm(c))
        for n in range(1, norms + 1):
            self.add_module(f"dropout{n}", nn.Dropout(c.dropout))

    def _residual(self, n: int, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """x with the n-th sublayer's result added, normed before or after."""
        norm, dropout = getattr(self, f"norm{n}"), getattr(self, f"dropout{n}")
        out: Tensor
        if self.config.norm_first:
            out = x + dropout(sublayer(norm(x)))
        else:
            out = norm(x + dropout(sublayer(x)))
        return out

    def _feed_forward(self, x: Tensor) -> Tensor:
        inner = self.linear1(x)
        if self.config.activation == "swiglu":
            inner = F.silu(self.linear_gate(x)) * inner
        else:
            inner = F.gelu(inner) if self.config.activation == "gelu" else F.relu(inner)
        out: Tensor = self.linear2(self.dropout(inner))
        return out


class EncoderLayer(_Layer):
    """Self-attention and a feed-forward network; with `config.causal` the layer of a GPT.

    Args:
        config: sizes and choices.
        position_bias: added to the scores, see `Alibi` and `RelativeBias`.
    """

    def __init__(self, config: LayerConfig, position_bias: nn.Module | None = None) -> None:
        super().__init__(config)
        self.self_attn = Attention(config, position_bias=position_bias)
        self._add_rest(2)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """`nn.TransformerEncoderLayer.forward`, argument for argument.

        Args:
            src: (N, L, d_model); (L, N, d_model) without batch_first, (L, d_model) unbatched.
            src_mask: (L, L) or (N * nhead, L, L): bool, True hides, or float, added.
            src_key_padding_mask: (N, L): bool, True hides, or float, added.
            is_causal: a hint that src_mask is causal; not needed with `config.causal`.

        Returns the same shape. Raises what `attn.MultiheadAttention` raises.
        """

        def attention(x: Tensor) -> Tensor:
            hint = is_causal and src_mask is not None
            return self.self_attn(
                x,
                x,
                x,
                key_padding_mask=src_key_padding_mask,
                need_weights=False,
                attn_mask=src_mask,
                is_causal=hint if self.config.causal else is_causal,
            )[0]

        return self._residual(2, self._residual(1, src, attention), self._feed_forward)

    def step(self, x: Tensor, cache: LayerCache) -> Tensor:
        """The layer on new tokens (N, L, d_model) only, behind those in the cache. See `Attention.step`."""
        x = self._residual(1, x, lambda y: self.self_attn.step(y, cache))
        return self._residual(2, x, self._feed_forward)


class DecoderLayer(_Layer):
    """Self-attention, cross-attention to a memory, and a feed-forward network.

    Args:
        config: sizes and choices; `causal=True` makes the self-attention causal without a mask.
        position_bias: added to the scores of self-attention.
        kdim: features of the memory's keys, of its values `vdim`, where they are not d_model.
        vdim: see kdim.
    """

    def __init__(
        self,
        config: LayerConfig,
        position_bias: nn.Module | None = None,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
    ) -> None:
        super().__init__(config)
        self.self_attn = Attention(config, position_bias=position_bias)
        self.multihead_attn = Attention(config, cross=True, kdim=kdim, vdim=vdim)
        self._add_rest(3)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor | Pair,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """`nn.TransformerDecoderLayer.forward`, argument for argument.

        Args:
            tgt: (N, L, d_model); (L, N, d_model) without batch_first, (L, d_model) unbatched.
            memory: (N, S, d_model), or a pair of keys (N, S, kdim) and values (N, S, vdim).
            tgt_mask: (L, L) or (N * nhead, L, L): bool, True hides, or float, added.
            memory_mask: (L, S) or (N * nhead, L, S), likewise.
            tgt_key_padding_mask: (N, L), likewise.
            memory_key_padding_mask: (N, S), likewise.
            tgt_is_causal: a hint that tgt_mask is causal; not needed with `config.causal`.
            memory_is_causal: a hint that memory_mask is causal.

        Returns tgt's shape. Raises what `attn.MultiheadAttention` raises.
        """
        key, value = memory if isinstance(memory, tuple) else (memory, memory)

        def itself(x: Tensor) -> Tensor:
            hint = tgt_is_causal and tgt_mask is not None
            return self.self_attn(
                x,
                x,
                x,
                key_padding_mask=tgt_key_padding_mask,
                need_weights=False,
                attn_mask=tgt_mask,
                is_causal=hint if self.config.causal else tgt_is_causal,
            )[0]

        def across(x: Tensor) -> Tensor:
            return self.multihead_attn(
                x,
                key,
                value,
                key_padding_mask=memory_key_padding_mask,
                need_weights=False,
                attn_mask=memory_mask,
                is_causal=memory_is_causal,
            )[0]

        x = self._residual(2, self._residual(1, tgt, itself), across)
        return self._residual(3, x, self._feed_forward)

    def remember(self, memory: Tensor | Pair, memory_key_padding_mask: Tensor | None = None) -> Memory:
        """The memory's keys and values, projected once for all calls of `step`."""
        key, value = memory if isinstance(memory, tuple) else (memory, memory)
        return self.multihead_attn.remember(key, value, memory_key_padding_mask)

    def step(self, x: Tensor, cache: LayerCache, memory: Memory) -> Tensor:
        """The layer on new tokens (N, L, d_model) only, behind those in the cache. See `Attention.step`."""
        x = self._residual(1, x, lambda y: self.self_attn.step(y, cache))
        x = self._residual(2, x, lambda y: self.multihead_attn.recall(y, memory))
        return self._residual(3, x, self._feed_forward)
