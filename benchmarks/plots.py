"""Figures from what `bench --json` wrote: bars and lines over the length, all works beside each other, the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from attn.benchmarks.report import significant, title
from attn.benchmarks.work import parse

OURS = ("#c1272d", "#e4572e", "#8c1c21", "#f2a541", "#d98880")
PEERS = ("#1f4e79", "#5b8db8", "#9bb8d3", "#4d8f6f", "#8a7ab8", "#b08968", "#6b6b6b", "#c9a227")
BAND = 0.15
MOST_SERIES = 8
Result = dict[str, Any]


def draw(everything: dict[str, Any], path: Path) -> None:
    """Write the figure of a run to a PNG. Raises ValueError where the run has no times at all."""
    found = [f for f in everything["results"] if any(r["p50_ms"] for r in f["rows"])]
    if not found:
        raise ValueError("there is nothing to draw: no contender has a time")
    colours = _colours(found)
    series = _series(found)
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = _over_length(series, colours) if series else _side_by_side(found, colours)
        _roofline(figure.axes[-1], found, everything["roofline"], colours)
        figure.suptitle(_heading(everything["machine"]))
        figure.savefig(path, dpi=150)


def _heading(machine: dict[str, Any]) -> str:
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    return f"attn {machine['attn']}, torch {machine['torch']}, {where}"


def _colours(found: Sequence[Result]) -> dict[str, str]:
    """A colour for each contender that has a time: warm ones are ours."""
    names = {r["contender"]: r["ours"] for f in found for r in f["rows"] if r["p50_ms"]}
    ours, peers = ([n for n, own in names.items() if own is wanted] for wanted in (True, False))
    pairs = [*zip(ours, OURS * len(ours), strict=False), *zip(peers, PEERS * len(peers), strict=False)]
    return dict(pairs)


def _series(found: Sequence[Result]) -> dict[str, list[Result]]:
    """Results that differ in length alone (and in the batch that goes with it), by what they have in common."""
    groups: dict[str, list[Result]] = {}
    for f in found:
        w = parse(f["work"])
        if w.line:
            continue
        heads = f"H{w.H}" if w.Hkv in (0, w.H) else f"H{w.H}/{w.Hkv}"
        more = ", weights" if w.weights else ""
        layers = f", {w.layers} layers" if w.layers > 1 else ""
        passes = "forward + backward" if w.what == "both" else w.what
        groups.setdefault(f"{w.kind} {passes}, {w.mask}, {heads} D{w.D}, {w.dtype}{more}{layers}", []).append(f)
    long = {name: sorted(fs, key=lambda f: f["length"]) for name, fs in groups.items() if _lengths(fs) > 1}
    return dict(sorted(long.items(), key=lambda item: -len(item[1]))[:MOST_SERIES])


def _lengths(found: Sequence[Result]) -> int:
    return len({f["length"] for f in found})


def _over_length(series: dict[str, list[Result]], colours: dict[str, str]) -> Figure:
    """A row for each series: speeds as bars, times as lines; the roofline goes below."""
    figure = Figure(figsize=(12, 3.4 * len(series) + 4.6), layout="constrained")
    grid = figure.add_gridspec(len(series) + 1, 2, height_ratios=[*[3.4] * len(series), 4])
    for n, (name, found) in enumerate(series.items()):
        bars, lines = figure.add_subplot(grid[n, 0]), figure.add_subplot(grid[n, 1])
        _bars(bars, found, colours)
        _lines(lines, found, colours)
        bars.set_title(name, fontsize=10, loc="left")
        lines.set_title("median, band p20 to p80", fontsize=9, loc="left")
        if n == 0:
            bars.set_ylim(0, 1.4 * bars.get_ylim()[1])  # above the bars
            bars.legend(fontsize=8, frameon=False, ncols=3, loc="upper left")
    figure.add_subplot(grid[-1, :])
    return figure


def _bars(axes: Axes, found: Sequence[Result], colours: dict[str, str]) -> None:
    names = [c for c in colours if any(_row(f, c) for f in found)]
    width = 0.84 / len(names)
    for n, name in enumerate(names):
        places, speeds = [], []
        for i, f in enumerate(found):
            row = _row(f, name)
            if row:
                places.append(i + (n - (len(names) - 1) / 2) * width)
                speeds.append(row["gflops"])
        axes.bar(places, speeds, width, color=colours[name], label=name)
    axes.set_xticks(range(len(found)), [str(f["length"]) for f in found])
    axes.set_xlabel("length")
    axes.set_ylabel("GFLOP/s of visible pairs")


def _lines(axes: Axes, found: Sequence[Result], colours: dict[str, str]) -> None:
    for name, colour in colours.items():
        rows = [(f["length"], _row(f, name)) for f in found]
        points = [(length, row) for length, row in rows if row]
        if not points:
            continue
        lengths = [length for length, _ in points]
        low, middle, high = ([row[p] for _, row in points] for p in ("p20_ms", "p50_ms", "p80_ms"))
        axes.plot(lengths, middle, "o-", color=colour, markersize=4, label=name)
        axes.fill_between(lengths, low, high, color=colour, alpha=BAND, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({f["length"] for f in found})
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.4, high * 1.4)  # so that two ticks at least have a number
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 8 * low else (1, 2, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_xlabel("length")
    axes.set_ylabel("ms")


def _side_by_side(found: Sequence[Result], colours: dict[str, str]) -> Figure:
    """Where nothing was swept: each work with its contenders, times relative to the best of ours."""
    figure = Figure(figsize=(12, 0.62 * len(found) + 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[0.62 * len(found) + 1, 4.6])
    axes = figure.add_subplot(grid[0])
    width = 0.84 / max(1, max(sum(1 for c in colours if _row(f, c)) for f in found))
    labelled: set[str] = set()
    for i, f in enumerate(found):
        there = [(c, row) for c in colours if (row := _row(f, c))]
        unit = min((row["p50_ms"] for _, row in there if row["ours"]), default=there[0][1]["p50_ms"])
        for n, (name, row) in enumerate(there):
            place = i + (n - (len(there) - 1) / 2) * width
            label = None if name in labelled else name
            axes.barh(place, row["p50_ms"] / unit, width, color=colours[name], label=label)
            axes.text(row["p50_ms"] / unit * 1.02, place, f"{significant(row['p50_ms'])} ms", va="center", fontsize=7)
            labelled.add(name)
    axes.set_yticks(range(len(found)), [title(f) for f in found], fontsize=8)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("time, best of attn = 1 (log scale): bars to the right are slower")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    figure.add_subplot(grid[1])
    return figure


def _roofline(axes: Axes, found: Sequence[Result], roof: dict[str, Any], colours: dict[str, str]) -> None:
    intensities = [f["flops"] / f["bytes"] for f in found]
    tops: dict[float, list[str]] = {}
    for dtype in sorted({f["dtype"] for f in found}):
        tops.setdefault(max(roof["gflops"][dtype], roof["gflops"].get("float32", 0.0)), []).append(dtype)
    knees = [top / roof["gbytes"] for top in tops]
    first, last, furthest = min([*intensities, *knees]) / 2, max([*intensities, *knees]) * 2, max(knees)
    axes.plot([first, furthest], [first * roof["gbytes"], furthest * roof["gbytes"]], color="black", linewidth=1.2)
    for top, dtypes in tops.items():
        axes.plot([top / roof["gbytes"], last], [top, top], color="black", linewidth=1.2)
        said = f"{top:.3g} GFLOP/s: matrix product, {', '.join(dtypes)}"
        axes.annotate(said, (last, top), ha="right", va="bottom", fontsize=8)
    copied = f"  {roof['gbytes']:.3g} GB/s: copy"
    axes.annotate(copied, (first * 1.2, first * roof["gbytes"]), va="top", fontsize=8)
    for name, colour in colours.items():
        points = [(f["flops"] / f["bytes"], row["gflops"]) for f in found if (row := _row(f, name))]
        if points:
            axes.scatter(*zip(*points, strict=True), s=18, color=colour, label=name, zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte (each operand and result moved once)")
    axes.set_ylabel("GFLOP/s")
    axes.set_title("roofline of this run", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="lower right")


def _row(found: Result, name: str) -> Result | None:
    """That contender's row, if it has a time."""
    row: Result
    for row in found["rows"]:
        if row["contender"] == name and row["p50_ms"]:
            return row
    return None
