"""An encoder that reads both ways and predicts hidden tokens, and how tokens are hidden."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attn.transformer.config import LayerConfig, positive
from attn.transformer.embedding import TokenEmbedding
from attn.transformer.norms import make_norm
from attn.transformer.positions import scheme
from attn.transformer.stacks import Encoder


class BERT(nn.Module):
    """Tokens in, scores of what each token was before it was hidden out (Devlin et al., 2019).

    Args:
        vocab_size: tokens, the one that hides included.
        config: of the layers, taken as not causal.
        num_layers: how many.
        max_len: the longest sequence.
        positions: a scheme by name, see `scheme`.
    """

    def __init__(
        self, vocab_size: int, config: LayerConfig, num_layers: int, max_len: int, positions: str = "learned"
    ) -> None:
        super().__init__()
        config = dataclasses.replace(config, causal=False, batch_first=True)
        where = scheme(positions, config, positive("max_len", max_len))
        self.config, self.max_len = dataclasses.replace(config, rotary=where.rotary), max_len
        self.embedding = TokenEmbedding(vocab_size, config.d_model, where.features, config.dropout)
        self.stack = Encoder(self.config, num_layers, position_bias=where.bias)
        self.transform = nn.Linear(config.d_model, config.d_model)
        self.norm = make_norm(config)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def encode(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Features (N, L, d_model) of tokens (N, L); `padding` is bool (N, L), True hides.

        Raises TypeError and ValueError for tokens that are none, and for more of them than max_len.
        """
        if isinstance(tokens, Tensor) and tokens.dim() == 2 and tokens.shape[1] > self.max_len:
            raise ValueError(
                f"tokens: a sequence of {tokens.shape[1]} is longer than max_len={self.max_len} of the model"
            )
        out: Tensor = self.stack(self.embedding(tokens), src_key_padding_mask=padding)
        return out

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Scores (N, L, vocab_size) for each place; arguments as for `encode`."""
        x = self.norm(F.gelu(self.transform(self.encode(tokens, padding))))
        return F.linear(x, self.embedding.weight, self.bias)


def hide(
    tokens: Tensor,
    hider: int,
    vocab_size: int,
    *,
    padding: Tensor | None = None,
    share: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Hide tokens as BERT does: of a share of them 80 % become `hider`, 10 % another token, and 10 % stay.

    Args:
        tokens: integer (N, L).
        hider: the id that hides.
        vocab_size: other tokens are drawn below it.
        padding: bool (N, L), True where there is no token to hide.
        share: of the tokens.
        generator: for the draws, on the CPU.

    Returns (tokens with some hidden, bool (N, L) True at those to predict). Raises ValueError for a share outside
    [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share is {share}; it must be in [0, 1]")
    shape, device = tokens.shape, tokens.device
    chosen = (torch.rand(shape, generator=generator) < share).to(device)
    if padding is not None:
        chosen = chosen & ~padding
    fate = torch.rand(shape, generator=generator).to(device)
    others = torch.randint(vocab_size, shape, generator=generator).to(tokens)
    hidden = torch.where(chosen & (fate < 0.8), torch.full_like(tokens, hider), tokens)
    return torch.where(chosen & (fate >= 0.9), others, hidden), chosen
