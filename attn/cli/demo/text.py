"""English text that every full Python ships, as numbers, and the batches drawn from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

HIDDEN = 0
"""The symbol that stands for a masked character; also what fills up short sequences."""


@dataclass(frozen=True)
class Corpus:
    """Text and its characters."""

    text: str
    letters: str

    @cached_property
    def symbols(self) -> Tensor:
        """The text as int64 symbols from 1 on; 0 is HIDDEN."""
        number = {letter: i for i, letter in enumerate(self.letters, 1)}
        return torch.tensor([number[letter] for letter in self.text])

    @property
    def vocabulary(self) -> int:
        """Number of symbols, HIDDEN included."""
        return len(self.letters) + 1

    @cached_property
    def paragraphs(self) -> list[tuple[int, int]]:
        """Start and end in `text` of each paragraph of at least two lines."""
        found, start = [], 0
        for paragraph in self.text.split("\n\n"):
            if "\n" in paragraph.strip():
                found.append((start, start + len(paragraph)))
            start += len(paragraph) + 2
        return found


def corpus() -> Corpus:
    """Python's own manual. Raises ModuleNotFoundError where a distribution leaves it out."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore").decode()
    return Corpus(text, "".join(sorted(set(text))))


def windows(corpus: Corpus, generator: torch.Generator, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """(batch, length) symbols from anywhere, and at each place the symbol that comes next."""
    starts = torch.randint(len(corpus.symbols) - length, (batch,), generator=generator)
    pieces = corpus.symbols[starts[:, None] + torch.arange(length + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def gaps(
    corpus: Corpus, generator: torch.Generator, batch: int, length: int, share: float = 0.15
) -> tuple[Tensor, Tensor, Tensor]:
    """Paragraphs with a share of their characters hidden, (batch, length).

    Returns the symbols, the hidden symbols to find (-100 elsewhere) and True where a paragraph is over.
    """
    picked = torch.randint(len(corpus.paragraphs), (batch,), generator=generator).tolist()
    spans = [corpus.paragraphs[i] for i in picked]
    whole = torch.zeros(batch, length, dtype=torch.int64)
    lengths = torch.tensor([min(end - start, length) for start, end in spans])
    for row, (start, _), n in zip(whole, spans, lengths.tolist(), strict=True):
        row[:n] = corpus.symbols[start : start + n]
    over = torch.arange(length) >= lengths[:, None]
    hide = (torch.rand(whole.shape, generator=generator) < share) & ~over
    return whole.masked_fill(hide, HIDDEN), whole.masked_fill(~hide, -100), over
