"""Stacks of layers, with the state dicts of `nn.TransformerEncoder`, `nn.TransformerDecoder` and `nn.Transformer`."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from attn.transformer.cache import KVCache, Memory
from attn.transformer.config import LayerConfig, positive
from attn.transformer.layers import DecoderLayer, EncoderLayer, Pair
from attn.transformer.norms import make_norm


class Encoder(nn.Module):
    """Encoder layers one after another; with `config.causal` the stack of a GPT.

    Args:
        config: of the layers.
        num_layers: how many.
        position_bias: one module that all layers share.
        final_norm: a norm after the last layer; None means where the layers put theirs first.
    """

    def __init__(
        self,
        config: LayerConfig,
        num_layers: int,
        *,
        position_bias: nn.Module | None = None,
        final_norm: bool | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            EncoderLayer(config, position_bias) for _ in range(positive("num_layers", num_layers))
        )
        self.norm = make_norm(config) if (config.norm_first if final_norm is None else final_norm) else None

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """`nn.TransformerEncoder.forward`; see `EncoderLayer.forward`. `is_causal` None stands for False."""
        for layer in self.layers:
            src = layer(src, mask, src_key_padding_mask, bool(is_causal))
        return _normed(self.norm, src)

    def step(self, x: Tensor, cache: KVCache) -> Tensor:
        """The stack on new tokens (N, L, d_model), behind those in the cache, which grows by them.

        Raises ValueError where the cache does not fit or overflows, RuntimeError as `Attention.step`.
        """
        _prepare(cache, x, self.config, len(self.layers))
        for n, layer in enumerate(self.layers):
            x = layer.step(x, cache.layer(n))  # type: ignore[operator]
        cache.advance(_tokens(x, self.config))
        return _normed(self.norm, x)


class Decoder(nn.Module):
    """Decoder layers one after another.

    Args:
        config: of the layers.
        num_layers: how many.
        position_bias: one module that the self-attentions of all layers share.
        final_norm: a norm after the last layer; None means where the layers put theirs first.
        kdim: features of the memory's keys, of its values `vdim`, where they are not d_model.
        vdim: see kdim.
    """

    def __init__(
        self,
        config: LayerConfig,
        num_layers: int,
        *,
        position_bias: nn.Module | None = None,
        final_norm: bool | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            DecoderLayer(config, position_bias, kdim=kdim, vdim=vdim) for _ in range(positive("num_layers", num_layers))
        )
        self.norm = make_norm(config) if (config.norm_first if final_norm is None else final_norm) else None

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor | Pair,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """`nn.TransformerDecoder.forward`; see `DecoderLayer.forward`. `tgt_is_causal` None stands for False."""
        for layer in self.layers:
            tgt = layer(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                bool(tgt_is_causal),
                memory_is_causal,
            )
        return _normed(self.norm, tgt)

    def remember(self, memory: Tensor | Pair, memory_key_padding_mask: Tensor | None = None) -> list[Memory]:
        """Each layer's keys and values of the memory, for `step`."""
        return [layer.remember(memory, memory_key_padding_mask) for layer in self.layers]  # type: ignore[operator]

    def step(self, x: Tensor, cache: KVCache, memories: list[Memory]) -> Tensor:
        """The stack on new tokens (N, L, d_model), behind those in the cache, which grows by them.

        Raises ValueError where the cache does not fit or overflows, RuntimeError as `Attention.step`.
        """
        _prepare(cache, x, self.config, len(self.layers))
        for n, (layer, memory) in enumerate(zip(self.layers, memories, strict=True)):
            x = layer.step(x, cache.layer(n), memory)  # type: ignore[operator]
        cache.advance(_tokens(x, self.config))
        return _normed(self.norm, x)


class Transformer(nn.Module):
    """Encoder and decoder, each with a final norm, as `nn.Transformer`.

    Args:
        config: of the layers of both; where it is causal, the decoder's only are.
        num_encoder_layers: how many.
        num_decoder_layers: how many.
        encoder_bias: position bias of the encoder's self-attention, of the decoder's `decoder_bias`.
        decoder_bias: see encoder_bias.
    """

    def __init__(
        self,
        config: LayerConfig,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        *,
        encoder_bias: nn.Module | None = None,
        decoder_bias: nn.Module | None = None,
    ) -> None:
        super().__init__()
        both_ways = dataclasses.replace(config, causal=False)
        self.encoder = Encoder(both_ways, num_encoder_layers, position_bias=encoder_bias, final_norm=True)
        self.decoder = Decoder(config, num_decoder_layers, position_bias=decoder_bias, final_norm=True)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """`nn.Transformer.forward`; see `Encoder.forward` and `Decoder.forward`."""
        memory = self.encoder(src, src_mask, src_key_padding_mask, src_is_causal)
        out: Tensor = self.decoder(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            tgt_is_causal,
            memory_is_causal,
        )
        return out


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    out: Tensor = x if norm is None else norm(x)
    return out


def _tokens(x: Tensor, config: LayerConfig) -> int:
    return x.shape[1 if config.batch_first else 0]


def _prepare(cache: KVCache, x: Tensor, config: LayerConfig, layers: int) -> None:
    """Check that the cache fits, and make room in it."""
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; decoding with a cache takes batches of 3 dims")
    cache.check(config, layers, x.shape[0 if config.batch_first else 1])
    cache.reserve(_tokens(x, config))
