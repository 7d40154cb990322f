"""The two models of the demo, written as people write them, and what they are trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attn.cli.demo.text import Corpus, gaps, windows

SEED = 2017


@dataclass(frozen=True)
class Size:
    """How large the models are and how long they are trained."""

    steps: int
    seconds: float
    """A busy or slow machine stops each model's training here, before all steps are done."""
    width: int
    heads: int
    layers: int
    batch: int
    length: int


FULL = Size(steps=120, seconds=75, width=128, heads=4, layers=4, batch=8, length=192)
QUICK = Size(steps=40, seconds=14, width=64, heads=4, layers=2, batch=8, length=128)


@dataclass(frozen=True)
class Task:
    """A model and its batches."""

    name: str
    call: str
    """How the model calls its attention."""
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, torch.Generator, torch.device], Tensor]
    """The model's loss on the next batch that the generator gives."""


class Block(nn.Module):
    """A pre-norm transformer block around one `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, **how: Tensor | bool) -> Tensor:
        """x (N, L, width); `how` goes to the attention."""
        y = self.norm(x)
        x = x + self.attention(y, y, y, **how)[0]
        out: Tensor = x + self.feed_forward(x)
        return out


class Transformer(nn.Module):
    """Symbols in, scores of symbols out."""

    def __init__(self, vocabulary: int, size: Size) -> None:
        super().__init__()
        self.symbols = nn.Embedding(vocabulary, size.width)
        self.places = nn.Parameter(0.02 * torch.randn(size.length, size.width))
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.layers))
        self.head = nn.Sequential(nn.LayerNorm(size.width), nn.Linear(size.width, vocabulary))

    def forward(self, symbols: Tensor, **how: Tensor | bool) -> Tensor:
        """symbols (N, L); returns (N, L, vocabulary)."""
        x = self.symbols(symbols) + self.places[: symbols.shape[1]]
        for block in self.blocks:
            x = block(x, **how)
        out: Tensor = self.head(x)
        return out


def gpt_task(corpus: Corpus, size: Size) -> Task:
    """Predict the next character; attention is causal and returns no weights."""

    def loss(model: nn.Module, generator: torch.Generator, device: torch.device) -> Tensor:
        x, y = (t.to(device) for t in windows(corpus, generator, size.batch, size.length))
        hidden = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=device)
        scores = model(x, attn_mask=hidden, is_causal=True, need_weights=False)
        return F.cross_entropy(scores.flatten(0, 1), y.flatten())

    return Task("GPT, next character", "causal, need_weights=False", lambda: _seeded(corpus, size), loss)


def encoder_task(corpus: Corpus, size: Size) -> Task:
    """Find hidden characters in paragraphs of all lengths; attention is called with PyTorch's defaults."""

    def loss(model: nn.Module, generator: torch.Generator, device: torch.device) -> Tensor:
        x, y, over = (t.to(device) for t in gaps(corpus, generator, size.batch, size.length))
        return F.cross_entropy(model(x, key_padding_mask=over).flatten(0, 1), y.flatten())

    return Task("Encoder, hidden characters", "padding, need_weights=True", lambda: _seeded(corpus, size), loss)


def _seeded(corpus: Corpus, size: Size) -> Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return Transformer(corpus.vocabulary, size)
