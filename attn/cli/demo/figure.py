"""The demo's picture: loss curves above, what a step costs below."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attn.cli.demo.train import Pair

TORCH, ATTN = "#E69F00", "#0072B2"  # of Okabe and Ito's palette, told apart by colour-blind readers and in grey
LABELS = ("nn.MultiheadAttention", "attn.replace(model)")


def draw(pairs: list[Pair], folder: Path) -> Path:
    """Writes demo.png into the folder, which is made if it is not there, and returns its path."""
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 7.2), layout="constrained")
        above, below = figure.subplots(2, 2, height_ratios=[3, 2])
        for axes, pair in zip(above, pairs, strict=True):
            _curves(axes, pair)
        _bars(below[0], pairs, "ms per step (median)", [(p.stock.ms, p.ours.ms) for p in pairs])
        memory = [((p.stock.peak_bytes or 0) / 2**20, (p.ours.peak_bytes or 0) / 2**20) for p in pairs]
        _bars(below[1], pairs, "peak memory of a step, MiB", memory)
        figure.suptitle("One seed, two trainings: PyTorch's attention, and ours put in its place", fontsize=13)
        figure.legend(*above[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "demo.png"
        figure.savefig(path, dpi=130)
    return path


def _curves(axes: Axes, pair: Pair) -> None:
    steps = range(1, len(pair.stock.losses) + 1)
    axes.plot(steps, pair.stock.losses, color=TORCH, linewidth=5, alpha=0.75, label=LABELS[0])
    axes.plot(steps, pair.ours.losses, color=ATTN, linewidth=1.5, label=LABELS[1])
    axes.set_title(f"{pair.task.name}\n{pair.task.call}", fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per character)")
    axes.margins(x=0.01)
    axes.grid(alpha=0.25)
    words = f"largest relative difference {max(pair.differences):.1e}"
    axes.text(0.98, 0.94, words, transform=axes.transAxes, ha="right", va="top")


def _bars(axes: Axes, pairs: list[Pair], title: str, values: list[tuple[float, float]]) -> None:
    for shift, color, which in ((-0.19, TORCH, 0), (0.19, ATTN, 1)):
        places = [i + shift for i in range(len(pairs))]
        bars = axes.bar(places, [v[which] for v in values], 0.36, color=color)
        axes.bar_label(bars, fmt="{:.1f}", padding=2)
    axes.set_xticks(range(len(pairs)), [_tick(pair) for pair in pairs])
    axes.set_title(title, fontsize=11)
    axes.margins(y=0.15)


def _tick(pair: Pair) -> str:
    backends = sorted({backend for backend, _ in pair.ran})
    return f"{pair.task.name.partition(',')[0]}\n(ours ran on {', '.join(backends)})"
