"""The figure of `rnn.py`: four panels, recurrent nets in blue and green, attention in red and orange."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

STYLES = {
    "LSTM": ("#1f4e79", "o", "-"),
    "bidirectional LSTM": ("#4d8f6f", "s", "--"),
    "attention, causal": ("#c1272d", "o", "-"),
    "attention, full": ("#e09f3e", "s", "--"),
}
"""Colour, mark, line: in pairs, those that see the past and those that see all."""


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the figure of what `rnn.py --json` wrote to a PNG."""
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 8.4), layout="constrained")
        step, cut, more, recall = figure.subplots(2, 2).flat
        _curves(step, found["one_sequence"], "p50_ms", "a training step of one sequence", "ms of processor time")
        _curves(cut, found["same_tokens"], "gflops", _tokens(found), "GFLOP/s")
        cut.set_yscale("linear")
        top = found["matrix_product_gflops"]
        cut.set_ylim(0, 1.1 * max(top, cut.get_ylim()[1]))
        cut.axhline(top, color="black", linewidth=0.8)
        cut.annotate(
            "matrix product", (0.99, top), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
        _curves(more, found["one_more"], "p50_ms", "one token more", "ms of processor time")
        _recall(recall, found["recall"])
        step.legend(fontsize=9, frameon=False, loc="upper left")
        m = found["machine"]
        figure.suptitle(f"{found['features']} features, one thread of {m['cpu']}, torch {m['torch']}", fontsize=10)
        figure.savefig(path, dpi=110)


def _tokens(found: dict[str, Any]) -> str:
    row = found["same_tokens"][0]
    return f"{row['batch'] * row['length']} tokens, cut into sequences: a training step"


def _curves(axes: Axes, rows: Sequence[dict[str, Any]], value: str, title: str, unit: str) -> None:
    lengths = sorted({row["length"] for row in rows})
    for net, (colour, mark, line) in STYLES.items():
        own = [row for row in rows if row["net"] == net]
        at = [row["length"] for row in own]
        axes.plot(at, [row[value] for row in own], line, marker=mark, color=colour, markersize=5, label=net)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("length of a sequence")
    axes.set_ylabel(unit)
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(alpha=0.25)


def _recall(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        colour, mark, line = STYLES[row["net"]]
        axes.plot(row["pairs"], row["right"], line, marker=mark, color=colour, markersize=5, label=row["net"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(rows[0]["pairs"], [str(n) for n in rows[0]["pairs"]])
    axes.set_ylim(0, 1.05)
    axes.axhline(1 / rows[0]["values"], color="black", linewidth=0.8)
    guess = (0.99, 1 / rows[0]["values"])
    axes.annotate("guessing", guess, xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axes.set_xlabel("pairs of a key and a value that were shown")
    axes.set_ylabel("share of values recalled")
    axes.set_title("recall", fontsize=10, loc="left")
    axes.grid(alpha=0.25)
