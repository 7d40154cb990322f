"""Models whose decoder attends to something else: a sentence in another language, an image."""

from __future__ import annotations

from torch import Tensor

from attn.transformer.cache import KVCache, Memory
from attn.transformer.config import LayerConfig
from attn.transformer.layers import Pair
from attn.transformer.stacks import Decoder, Encoder
from attn.transformer.token_model import CausalModel, TokenModel, placed


class CrossDecoder(CausalModel):
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

    stack: Decoder

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
        config, where = placed(config, positions, max_len, causal=True)
        super().__init__(vocab_size, config, max_len, where.features)
        self.stack = Decoder(config, num_layers, position_bias=where.bias, final_norm=True, kdim=kdim, vdim=vdim)

    def forward(self, tokens: Tensor, memory: Tensor | Pair, memory_padding: Tensor | None = None) -> Tensor:
        """Scores of the token after each of `tokens`.

        Args:
            tokens: integer (N, L).
            memory: (N, S, d_model), or a pair of keys (N, S, kdim) and values (N, S, vdim).
            memory_padding: bool (N, S), True hides.

        Returns (N, L, vocab_size). Raises TypeError and ValueError for tokens that are none, and for more than max_len.
        """
        return self._scores(self.stack(self._embed(tokens), memory, memory_key_padding_mask=memory_padding))

    def remember(self, memory: Tensor | Pair, memory_padding: Tensor | None = None) -> list[Memory]:
        """The memory's keys and values, projected once, for `step`."""
        return self.stack.remember(memory, memory_padding)

    def step(self, tokens: Tensor, cache: KVCache, memories: list[Memory]) -> Tensor:
        """`forward` on tokens (N, L) behind those in the cache, which grows by them.

        Raises as `forward`, ValueError for a cache that does not fit or overflows, RuntimeError in training and where
        gradients would be lost.
        """
        return self._scores(self.stack.step(self._embed_next(tokens, cache), cache, memories))


class EncoderDecoder(TokenModel):
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
        both_ways, where = placed(config, positions, max_len, causal=False)
        super().__init__(source_vocab, both_ways, max_len, where.features)
        self.encoder = Encoder(both_ways, num_layers, position_bias=where.bias, final_norm=True)
        self.decoder = CrossDecoder(target_vocab, config, num_layers, max_len, positions)

    def encode(self, source: Tensor, source_padding: Tensor | None = None) -> Tensor:
        """The memory (N, S, d_model) of source tokens (N, S); `source_padding` is bool (N, S), True hides.

        Raises TypeError and ValueError for tokens that are none, and for more of them than max_len.
        """
        out: Tensor = self.encoder(self._embed(source, "source"), src_key_padding_mask=source_padding)
        return out

    def forward(self, source: Tensor, tokens: Tensor, source_padding: Tensor | None = None) -> Tensor:
        """Scores (N, L, target_vocab) of the token after each of the target's `tokens` (N, L)."""
        out: Tensor = self.decoder(tokens, self.encode(source, source_padding), source_padding)
        return out
