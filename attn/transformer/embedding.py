"""From token ids to features with positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attn.operands import check_range
from attn.transformer.config import positive


class TokenEmbedding(nn.Module):
    """A learned row per token, with positions added.

    Rows are drawn with variance 1 / d_model and multiplied by its root (Vaswani et al., 2017): features of size 1,
    and a table that also serves as the matrix of a model's scores.

    Args:
        vocab_size: rows.
        d_model: features.
        positions: a module that adds positions, see `scheme`; None adds none.
        dropout: probability.
    """

    def __init__(self, vocab_size: int, d_model: int, positions: nn.Module | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(positive("vocab_size", vocab_size), d_model) * d_model**-0.5)
        self.positions, self.dropout = positions, nn.Dropout(dropout)

    @property
    def vocab_size(self) -> int:
        """Rows of the table."""
        return self.weight.shape[0]

    def forward(self, tokens: Tensor, positions: Tensor | None = None, *, name: str = "tokens") -> Tensor:
        """Look tokens up.

        Args:
            tokens: integer (N, L).
            positions: integer (N, L), where they stand; None means 0 .. L - 1.
            name: what an error calls them.

        Returns (N, L, d_model). Raises TypeError and ValueError for ids of another dtype or shape; on CPU ValueError
        for ids outside of the vocabulary and positions outside of the table.
        """
        check_tokens(name, tokens, self.vocab_size)
        x = self.weight[tokens] * self.weight.shape[1] ** 0.5
        if self.positions is not None:
            x = self.positions(x, positions)
        out: Tensor = self.dropout(x)
        return out


def check_tokens(name: str, tokens: Tensor, vocab_size: int) -> None:
    """Raise TypeError or ValueError for what are not token ids (N, L) in [0, vocab_size)."""
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int32, torch.int64):
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{name} is {kind}; give an int64 tensor of token ids")
    if tokens.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(tokens.shape)}; it must be (N, L)")
    check_range(name, tokens, 0, vocab_size - 1)
