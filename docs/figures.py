"""The figures of kernels.md, drawn from what the package says of its masks: `python docs/figures.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

from attn import masks
from attn.spec import Operands

FOLDER = Path(__file__).parent / "img"
LENGTH, TILE = 64, 8
EMPTY, PARTIAL, FULL = "#ffffff", "#f2a541", "#1f4e79"
QUERY, KEY, STATE, OUT = "#c1272d", "#1f4e79", "#f2a541", "#4d8f6f"


def tiles() -> Figure:
    """What a kernel does with each tile, for four masks."""
    documents = torch.arange(LENGTH)[None] // 22
    calls = {
        "causal": {"right": 0},
        "window of 12 to the left": {"left": 12, "right": 0},
        "padding: 45 keys": {"key_lengths": torch.tensor([45], dtype=torch.int32)},
        "three documents, causal": {"right": 0, "ids_q": documents, "ids_k": documents},
    }
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    q = torch.empty(1, 1, LENGTH, 1)
    for axes, (name, fields) in zip(figure.subplots(1, len(calls)), calls.items(), strict=True):
        found = masks.tile_classes(Operands(q, q, q, **fields), TILE, TILE)[0, 0]
        order = [int(c) for c in (masks.EMPTY, masks.PARTIAL, masks.FULL)]
        shown = sum(n * (found == c).int() for n, c in enumerate(order))
        axes.imshow(shown, cmap=ListedColormap([EMPTY, PARTIAL, FULL]), vmin=0, vmax=2)
        axes.set_xticks(torch.arange(-0.5, LENGTH // TILE).tolist(), minor=True)
        axes.set_yticks(torch.arange(-0.5, LENGTH // TILE).tolist(), minor=True)
        axes.grid(which="minor", color="#b0b0b0", linewidth=0.6)
        axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("tiles of keys", fontsize=9)
    figure.axes[0].set_ylabel("tiles of queries", fontsize=9)
    meanings = {"never read": EMPTY, "mask applied": PARTIAL, "no mask code": FULL}
    patches = [Patch(facecolor=c, edgecolor="#b0b0b0", label=name) for name, c in meanings.items()]
    figure.legend(handles=patches, ncols=3, loc="outside lower center", frameon=False, fontsize=9)
    return figure


def loop() -> Figure:
    """One block of queries on its way over the keys."""
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(0, 10.4)
    axes.set_ylim(0, 3.5)
    axes.set_axis_off()
    _box(axes, 0.1, 1.05, 1.5, 1.0, QUERY, "block of Q\nread once")
    for n in range(4):
        _box(axes, 2.3 + 1.05 * n, 2.45, 0.95, 0.8, KEY, f"K, V\ntile {n + 1}")
    _box(axes, 6.5, 2.45, 0.95, 0.8, "#d0d0d0", "hidden:\nskipped", "black")
    _box(axes, 2.3, 1.05, 2.9, 1.0, STATE, "S = QKᵀ · scale + bias, mask\nP = exp(S − m)", "black")
    _box(axes, 5.7, 1.05, 2.0, 1.0, STATE, "m: maximum so far\nl: sum so far\nO: scaled, + PV", "black")
    _box(axes, 8.3, 1.05, 2.0, 1.0, OUT, "out = O / l\nkept: m, l")
    for a, b in (
        ((1.6, 1.55), (2.3, 1.55)),
        ((5.2, 1.55), (5.7, 1.55)),
        ((7.7, 1.55), (8.3, 1.55)),
        ((3.75, 2.45), (3.75, 2.05)),
    ):
        axes.add_patch(FancyArrowPatch(a, b, arrowstyle="-|>", mutation_scale=14, color="black"))
    back = FancyArrowPatch(
        (6.7, 1.05), (3.75, 1.05), connectionstyle="arc3,rad=-0.25", arrowstyle="-|>", mutation_scale=14, color="black"
    )
    axes.add_patch(back)
    axes.text(5.2, 0.38, "next tile of keys", ha="center", fontsize=10)
    return figure


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str, ink: str = "white"
) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="none"))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink, fontsize=10)


def main() -> None:
    """Writes the PNGs."""
    FOLDER.mkdir(exist_ok=True)
    for draw in (tiles, loop):
        draw().savefig(FOLDER / f"{draw.__name__}.png", dpi=110)


if __name__ == "__main__":
    main()
