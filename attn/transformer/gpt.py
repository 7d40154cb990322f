"""A causal language model, and generation with or without a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from attn.transformer.cache import KVCache
from attn.transformer.config import LayerConfig, one_of, positive
from attn.transformer.stacks import Encoder
from attn.transformer.token_model import CausalModel, placed

CACHES = ("static", "paged", "none")


class GPT(CausalModel):
    """Tokens in, scores of the next token out (Radford et al., 2018).

    Args:
        vocab_size: tokens.
        config: of the layers, taken as causal.
        num_layers: how many.
        max_len: the longest sequence.
        positions: a scheme by name, see `scheme`.
    """

    stack: Encoder

    def __init__(
        self, vocab_size: int, config: LayerConfig, num_layers: int, max_len: int, positions: str = "learned"
    ) -> None:
        config, where = placed(config, positions, max_len, causal=True)
        super().__init__(vocab_size, config, max_len, where.features)
        self.stack = Encoder(config, num_layers, position_bias=where.bias, final_norm=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores (N, L, vocab_size) of the token after each of `tokens` (N, L).

        Raises TypeError and ValueError for tokens that are none, and for more of them than max_len.
        """
        return self._scores(self.stack(self._embed(tokens)))

    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """`forward` on tokens (N, L) behind those in the cache, which grows by them.

        Raises as `forward`, ValueError for a cache that does not fit or overflows, RuntimeError in training and where
        gradients would be lost.
        """
        return self._scores(self.stack.step(self._embed_next(tokens, cache), cache))

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


def _drawn(scores: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """A token (N, 1) from scores (N, vocab_size)."""
    if temperature == 0.0:
        return scores.argmax(-1, keepdim=True)
    if top_k is not None and top_k < scores.shape[-1]:
        least = scores.topk(top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    return torch.multinomial((scores.float() / temperature).softmax(-1), 1, generator=generator)
