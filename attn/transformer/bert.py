"""An encoder that reads both ways and predicts hidden tokens, and how tokens are hidden."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attn.transformer.config import LayerConfig
from attn.transformer.norms import make_norm
from attn.transformer.stacks import Encoder
from attn.transformer.token_model import TokenModel, placed


class BERT(TokenModel):
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
        config, where = placed(config, positions, max_len, causal=False)
        super().__init__(vocab_size, config, max_len, where.features)
        self.stack = Encoder(config, num_layers, position_bias=where.bias)
        self.transform = nn.Linear(config.d_model, config.d_model)
        self.norm = make_norm(config)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def encode(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Features (N, L, d_model) of tokens (N, L); `padding` is bool (N, L), True hides.

        Raises TypeError and ValueError for tokens that are none, and for more of them than max_len.
        """
        out: Tensor = self.stack(self._embed(tokens), src_key_padding_mask=padding)
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
