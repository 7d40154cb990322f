"""What the models of tokens share: positions by name, limits on tokens, and for causal ones a cache."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn
from torch.nn import functional as F

from attn.transformer.attention import check_inference
from attn.transformer.cache import KVCache
from attn.transformer.config import LayerConfig, positive
from attn.transformer.embedding import TokenEmbedding, check_tokens
from attn.transformer.positions import Scheme, scheme
from attn.transformer.stacks import Decoder, Encoder


class TokenModel(nn.Module):
    """Token ids in, features of at most max_len of them out.

    Args:
        vocab_size: tokens.
        config: of the layers, as `placed` returns it.
        max_len: the longest sequence.
        features: a module that adds positions to features; None adds none.
    """

    def __init__(self, vocab_size: int, config: LayerConfig, max_len: int, features: nn.Module | None) -> None:
        super().__init__()
        self.config, self.max_len = config, max_len
        self.embedding = TokenEmbedding(vocab_size, config.d_model, features, config.dropout)

    def _check(self, tokens: Tensor, before: int = 0, name: str = "tokens") -> None:
        """Raise TypeError or ValueError for what are no token ids (N, L), and where before + L exceeds max_len."""
        check_tokens(name, tokens, self.embedding.vocab_size)
        length = tokens.shape[1] + before
        if length > self.max_len:
            raise ValueError(f"{name}: a sequence of {length} is longer than max_len={self.max_len} of the model")

    def _embed(self, tokens: Tensor, name: str = "tokens") -> Tensor:
        """Features (N, L, d_model) of tokens (N, L); raises as `_check`."""
        self._check(tokens, name=name)
        out: Tensor = self.embedding(tokens, name=name)
        return out


class CausalModel(TokenModel):
    """A `TokenModel` that predicts the next token with the table of its embedding, and decodes with a cache."""

    stack: Encoder | Decoder

    def new_cache(self, batch: int, capacity: int | None = None, **pages: int | None) -> KVCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens (max_len if None).

        `pages` are `block_size` and `blocks` of `KVCache`. Raises ValueError for a capacity beyond max_len.
        """
        capacity = self.max_len if capacity is None else capacity
        if capacity > self.max_len:
            raise ValueError(f"capacity is {capacity}; the model's max_len is {self.max_len}")
        w = self.embedding.weight
        return KVCache(self.config, len(self.stack.layers), batch, capacity, dtype=w.dtype, device=w.device, **pages)

    def _embed_next(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Features (N, L, d_model) of tokens behind those in the cache, after all checks of both."""
        self._check(tokens, cache.used)
        check_inference(self, self.embedding.weight)
        cache.check(self.config, len(self.stack.layers), tokens.shape[0])
        out: Tensor = self.embedding(tokens, cache.positions(tokens.shape[1]))
        return out

    def _scores(self, x: Tensor) -> Tensor:
        return F.linear(x, self.embedding.weight)


def placed(config: LayerConfig, positions: str, max_len: int, *, causal: bool) -> tuple[LayerConfig, Scheme]:
    """The configuration of a model's layers, batch first, and where the position scheme of that name enters.

    Raises as `scheme`, and TypeError or ValueError for a max_len that is no int >= 1.
    """
    config = dataclasses.replace(config, causal=causal, batch_first=True)
    where = scheme(positions, config, positive("max_len", max_len))
    return dataclasses.replace(config, rotary=where.rotary), where
