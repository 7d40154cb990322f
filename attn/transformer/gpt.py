"""A causal language model, and generation with or without a cache."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attn.transformer.attention import check_inference
from attn.transformer.cache import KVCache
from attn.transformer.config import LayerConfig, one_of, positive
from attn.transformer.embedding import TokenEmbedding, check_tokens
from attn.transformer.positions import scheme
from attn.transformer.stacks import Encoder

CACHES = ("static", "paged", "none")


class GPT(nn.Module):
    """Tokens in, scores of the next token out (Radford et al., 2018).

    Args:
        vocab_size: tokens.
        config: of the layers, taken as causal.
        num_layers: how many.
        max_len: the longest sequence.
        positions: a scheme by name, see `scheme`.
    """

    def __init__(
        self, vocab_size: int, config: LayerConfig, num_layers: int, max_len: int, positions: str = "learned"
    ) -> None:
        super().__init__()
        config = dataclasses.replace(config, causal=True, batch_first=True)
        where = scheme(positions, config, positive("max_len", max_len))
        self.config, self.max_len = dataclasses.replace(config, rotary=where.rotary), max_len
        self.embedding = TokenEmbedding(vocab_size, config.d_model, where.features, config.dropout)
        self.stack = Encoder(self.config, num_layers, position_bias=where.bias, final_norm=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores (N, L, vocab_size) of the token after each of `tokens` (N, L).

        Raises TypeError and ValueError for tokens that are none, and for more of them than max_len.
        """
        self._check(tokens, 0)
        return self._scores(self.stack(self.embedding(tokens)))

    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """`forward` on tokens (N, L) behind those in the cache, which grows by them.

        Raises as `forward`, ValueError for a cache that does not fit or overflows, RuntimeError in training and where
        gradients would be lost.
        """
        self._check(tokens, cache.used)
        check_inference(self, self.embedding.weight)
        cache.check(self.config, len(self.stack.layers), tokens.shape[0])
        x = self.embedding(tokens, cache.positions(tokens.shape[1]))
        return self._scores(self.stack.step(x, cache))

    def new_cache(self, batch: int, capacity: int | None = None, **pages: int | None) -> KVCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens (max_len if None).

        `pages` are `block_size` and `blocks` of `KVCache`. Raises ValueError for a capacity beyond max_len.
        """
        capacity = self.max_len if capacity is None else capacity
        if capacity > self.max_len:
            raise ValueError(f"capacity is {capacity}; the model's max_len is {self.max_len}")
        w = self.embedding.weight
        return KVCache(self.config, len(self.stack.layers), batch, capacity, dtype=w.dtype, device=w.device, **pages)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        new: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        cache: str = "static",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue each sequence by `new` tokens.

        Args:
            tokens: the prompts, integer (N, L), L >= 1.
            new: tokens to add.
            temperature: 0 takes the likeliest token; else scores are divided by it before one is drawn.
            top_k: draw among the k likeliest only.
            cache: "static", "paged" (pages of 16 tokens) or "none", which computes every sequence anew for each token.
            generator: for the draws.

        Returns integer (N, L + new). Raises ValueError where that is longer than max_len, for an empty prompt and for
        numbers out of range.
        """
        one_of("cache", cache, CACHES)
        self._check(tokens, positive("new", new))
        if tokens.shape[1] < 1:
            raise ValueError("tokens: a prompt needs at least one token")
        if not 0.0 <= temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}; it must be >= 0")
        if top_k is not None:
            positive("top_k", top_k)
        length = tokens.shape[1]
        paged = {"block_size": 16} if cache == "paged" else {}
        kept = None if cache == "none" else self.new_cache(tokens.shape[0], length + new, **paged)
        given = tokens
        for _ in range(new):
            scores = self(tokens) if kept is None else self.step(given, kept)
            given = _drawn(scores[:, -1], temperature, top_k, generator)
            tokens = torch.cat((tokens, given), 1)
        return tokens

    def _scores(self, x: Tensor) -> Tensor:
        return F.linear(x, self.embedding.weight)

    def _check(self, tokens: Tensor, more: int) -> None:
        check_tokens("tokens", tokens, self.embedding.vocab_size)
        if tokens.shape[1] + more > self.max_len:
            raise ValueError(
                f"tokens: a sequence of {tokens.shape[1] + more} is longer than max_len={self.max_len} of the model"
            )


def _drawn(scores: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """A token (N, 1) from scores (N, vocab_size)."""
    if temperature == 0.0:
        return scores.argmax(-1, keepdim=True)
    if top_k is not None and top_k < scores.shape[-1]:
        least = scores.topk(top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    return torch.multinomial((scores.float() / temperature).softmax(-1), 1, generator=generator)
