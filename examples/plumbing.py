"""What the examples share: arguments, a training loop, a plot of what was learned, and a text."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

CURVES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))  # (colour, marker): told apart by
BASELINE = "#555555"  # colour-blind readers, and in grey


def arguments(text: str | None) -> argparse.Namespace:
    """`--out DIR` for the plot, `--quick` for a few steps that only show that all runs, `--seconds`, `--seed`."""
    parser = argparse.ArgumentParser(description=(text or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for plots (default: out)")
    parser.add_argument("--quick", action="store_true", help="a few steps: learns little, runs in seconds")
    parser.add_argument("--seconds", type=float, default=150.0, help="a busy machine ends training here (default: 150)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(given.seed)
    return given


def train(
    model: nn.Module,
    loss_of: Callable[[], Tensor],
    steps: int,
    seconds: float,
    *,
    rate: float = 3e-3,
    every: int = 0,
    check: Callable[[], float] | None = None,
) -> list[tuple[int, float]]:
    """Minimise `loss_of()` by AdamW for `steps` steps, or until a busy machine has used up `seconds`.

    The rate rises for a tenth of the way and then falls to 0. Every `every` steps and at the end `check()` is
    called with the model in eval mode; returned are (step, its value).
    """
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    start, done, seen = time.monotonic(), 0.0, []
    for step in range(1, steps + 1):
        done = max(step / steps, (time.monotonic() - start) / seconds)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(10 * done, 0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)))
        loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        last = done >= 1.0
        if check is not None and (last or (every and step % every == 0)):
            model.eval()
            with torch.no_grad():
                seen.append((step, check()))
            model.train()
            print(f"step {step:5d}  loss {loss.item():.3f}  held out {seen[-1][1]:.3f}", flush=True)
        if last:
            break
    return seen


def plot(path: Path, curves: dict[str, list[tuple[int, float]]], baselines: dict[str, float], label: str) -> None:
    """Held-out figures over steps, up to four curves, and the baselines as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, points), (colour, marker) in zip(curves.items(), CURVES, strict=False):
        axes.plot(*zip(*points, strict=True), marker=marker, label=name, color=colour)
    for name, value in baselines.items():
        axes.axhline(value, linestyle="--", color=BASELINE, label=f"{name} ({value:.3f})")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    print(f"plot: {path}")


class Manual:
    """Python's own manual as character ids, which every full Python has; the last tenth is held out."""

    def __init__(self) -> None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore").decode()
        self.letters = sorted(set(text))
        self.number = {letter: n for n, letter in enumerate(self.letters)}
        ids = self.ids(text)
        cut = len(ids) * 9 // 10
        self.train, self.held_out = ids[:cut], ids[cut:]

    def batch(self, size: int, length: int) -> Tensor:
        """(size, length) characters from anywhere in the part to train on."""
        starts = torch.randint(len(self.train) - length + 1, (size, 1))
        return self.train[starts + torch.arange(length)]

    def pieces(self, length: int, most: int) -> Tensor:
        """(at most `most`, length) characters, spread over the held-out part."""
        whole = self.held_out[: len(self.held_out) // length * length].view(-1, length)
        return whole[:: max(1, len(whole) // most)][:most]

    def bigram_bits(self) -> float:
        """Bits per held-out character of a model that knows the character before: counts, smoothed by one."""
        V = len(self.letters)
        counts = torch.ones(V, V)
        counts.view(-1).index_add_(0, self.train[:-1] * V + self.train[1:], torch.ones(len(self.train) - 1))
        odds = (counts / counts.sum(1, keepdim=True)).log2()
        return -float(odds[self.held_out[:-1], self.held_out[1:]].mean())

    def ids(self, text: str) -> Tensor:
        """A string as ids."""
        return torch.tensor([self.number[letter] for letter in text])

    def text(self, ids: Tensor) -> str:
        """Ids as a string."""
        return "".join(self.letters[n] for n in ids.tolist())
