"""Models whose decoder attends to something else: a sentence in another language, an image."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn
from torch.nn import functional as F

from attn.transformer.attention import check_inference
from attn.transformer.cache import KVCache, Memory
from attn.transformer.config import LayerConfig, positive
from attn.transformer.embedding import TokenEmbedding
from attn.transformer.layers import Pair
from attn.transformer.positions import Scheme, scheme
from attn.transformer.stacks import Decoder, Encoder


class CrossDecoder(nn.Module):
    """A causal decoder of tokens with cross-attention to a memory: text from image patches, for example.

    Args:
        vocab_size: tokens.
        config: of the layers, taken as causal.
        num_layers: how many.
        max_len: the longest sequence of tokens.
        positions: a scheme by name, see `scheme`.
        kdim: features of the memory's keys, of its values `vdim`, where they are not d_model.
        vdim: see kdim.
    """

    def __init__(
        self,
        vocab_size: int,
        config: LayerConfig,
        num_layers: int,
        max_len: int,
        positions: str = "learned",
        *,
        kdim: int | None = None,
        vdim: int | None = None,
    ) -> None:
        super().__init__()
        config, where = _placed(dataclasses.replace(config, causal=True), positions, max_len)
        self.config, self.max_len = config, max_len
        self.embedding = TokenEmbedding(vocab_size, config.d_model, where.features, config.dropout)
        self.stack = Decoder(config, num_layers, position_bias=where.bias, final_norm=True, kdim=kdim, vdim=vdim)

    def forward(self, tokens: Tensor, memory: Tensor | Pair, memory_padding: Tensor | None = None) -> Tensor:
        """Scores of the token after each of `tokens`.

        Args:
            tokens: integer (N, L).
            memory: (N, S, d_model), or a pair of keys (N, S, kdim) and values (N, S, vdim).
            memory_padding: bool (N, S), True hides.

        Returns (N, L, vocab_size). Raises TypeError and ValueError for tokens that are none, and for more than max_len.
        """
        self._check(tokens, 0)
        x = self.stack(self.embedding(tokens), memory, memory_key_padding_mask=memory_padding)
        return F.linear(x, self.embedding.weight)

    def remember(self, memory: Tensor | Pair, memory_padding: Tensor | None = None) -> list[Memory]:
        """The memory's keys and values, projected once, for `step`."""
        return self.stack.remember(memory, memory_padding)

    def step(self, tokens: Tensor, cache: KVCache, memories: list[Memory]) -> Tensor:
        """`forward` on tokens (N, L) behind those in the cache, which grows by them.

        Raises as `forward`, ValueError for a cache that does not fit or overflows, RuntimeError in training and where
        gradients would be lost.
        """
        self._check(tokens, cache.used)
        check_inference(self, self.embedding.weight)
        cache.check(self.config, len(self.stack.layers), tokens.shape[0])
        x = self.stack.step(self.embedding(tokens, cache.positions(tokens.shape[1])), cache, memories)
        return F.linear(x, self.embedding.weight)

    def new_cache(self, batch: int, capacity: int | None = None, **pages: int | None) -> KVCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens (max_len if None).

        `pages` are `block_size` and `blocks` of `KVCache`. Raises ValueError for a capacity beyond max_len.
        """
        capacity = self.max_len if capacity is None else capacity
        if capacity > self.max_len:
            raise ValueError(f"capacity is {capacity}; the model's max_len is {self.max_len}")
        w = self.embedding.weight
        return KVCache(self.config, len(self.stack.layers), batch, capacity, dtype=w.dtype, device=w.device, **pages)

    def _check(self, tokens: Tensor, before: int) -> None:
        if isinstance(tokens, Tensor) and tokens.dim() == 2 and tokens.shape[1] + before > self.max_len:
            raise ValueError(
                f"tokens: a sequence of {tokens.shape[1] + before} is longer than max_len={self.max_len} of the model"
            )


class EncoderDecoder(nn.Module):
    """Source tokens in, scores of target tokens out (Vaswani et al., 2017).

    Args:
        source_vocab: source tokens.
        target_vocab: target tokens.
        config: of the layers of encoder and decoder.
        num_layers: of each.
        max_len: the longest sequence, source or target.
        positions: a scheme by name, see `scheme`.
    """

    def __init__(
        self,
        source_vocab: int,
        target_vocab: int,
        config: LayerConfig,
        num_layers: int,
        max_len: int,
        positions: str = "sinusoidal",
    ) -> None:
        super().__init__()
        inner, where = _placed(dataclasses.replace(config, causal=False), positions, max_len)
        self.max_len = max_len
        self.embedding = TokenEmbedding(source_vocab, config.d_model, where.features, config.dropout)
        self.encoder = Encoder(inner, num_layers, position_bias=where.bias, final_norm=True)
        self.decoder = CrossDecoder(target_vocab, config, num_layers, max_len, positions)

    def encode(self, source: Tensor, source_padding: Tensor | None = None) -> Tensor:
        """The memory (N, S, d_model) of source tokens (N, S); `source_padding` is bool (N, S), True hides.

        Raises TypeError and ValueError for tokens that are none, and for more of them than max_len.
        """
        if isinstance(source, Tensor) and source.dim() == 2 and source.shape[1] > self.max_len:
            raise ValueError(
                f"source: a sequence of {source.shape[1]} is longer than max_len={self.max_len} of the model"
            )
        out: Tensor = self.encoder(self.embedding(source, name="source"), src_key_padding_mask=source_padding)
        return out

    def forward(self, source: Tensor, tokens: Tensor, source_padding: Tensor | None = None) -> Tensor:
        """Scores (N, L, target_vocab) of the token after each of the target's `tokens` (N, L)."""
        out: Tensor = self.decoder(tokens, self.encode(source, source_padding), source_padding)
        return out


def _placed(config: LayerConfig, positions: str, max_len: int) -> tuple[LayerConfig, Scheme]:
    config = dataclasses.replace(config, batch_first=True)
    where = scheme(positions, config, positive("max_len", max_len))
    return dataclasses.replace(config, rotary=where.rotary), where
