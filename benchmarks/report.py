"""What a run found: as plain values, as a table for a terminal, as CSV."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attn.benchmarks.compare import Change
from attn.benchmarks.harness import Result, Row
from attn.benchmarks.roofline import Roofline
from attn.benchmarks.work import Cost
from attn.cli.table import table

SEEN = 1.5
"""A slow-down that --compare ought to see."""
HEADERS = ("", "p20", "p50 ms", "p80", "GFLOP/s", "roofline", "MiB", "error")
WIDTHS = (-20, 8, 8, 8, 8, 11, 8, 6)
"""Of the columns; those below zero are aligned left."""
COLUMNS = ("work", "contender", "ours", "p20_ms", "p50_ms", "p80_ms", "gflops", "share", "bound", "memory", "error")


def plain(result: Result, roof: Roofline) -> dict[str, Any]:
    """One result as JSON holds it."""
    cost, dtype = Cost(result.flops, result.bytes), result.work.dtype
    return {
        "work": str(result.work),
        "kind": result.work.kind,
        "what": result.work.what,
        "dtype": dtype,
        "label": result.work.label,
        "length": result.work.S or result.work.L,
        "flops": result.flops,
        "bytes": result.bytes,
        "floor_ms": roof.floor_ms(cost, dtype),
        "bound": roof.bound(cost, dtype),
        "rows": [_row(row, cost, dtype, roof) for row in result.rows],
        "absent": result.absent,
    }


def _row(row: Row, cost: Cost, dtype: str, roof: Roofline) -> dict[str, Any]:
    timed = bool(row.ms)
    return {
        "contender": row.contender,
        "ours": row.ours,
        "p20_ms": row.percentile(20) if timed else None,
        "p50_ms": row.median if timed else None,
        "p80_ms": row.percentile(80) if timed else None,
        "gflops": cost.flops / row.median / 1e6 if timed else None,
        "share": roof.floor_ms(cost, dtype) / row.median if timed else None,
        "memory": row.memory,
        "error": None if math.isnan(row.error) else row.error,
        "wrong": row.wrong,
        "problem": row.problem,
        "ms": [round(ms, 6) for ms in row.ms],
    }


def title(found: dict[str, Any]) -> str:
    """The heading over the rows of one result."""
    passes = {"both": "forward + backward"}.get(found["what"], found["what"])
    return f"{found['kind']} {passes}, {found['dtype']}, {found['label']}"


def best(found: dict[str, Any]) -> str | None:
    """The quickest contender of a result, None where nobody has a time."""
    timed = [r for r in found["rows"] if r["p50_ms"] is not None]
    return min(timed, key=lambda r: r["p50_ms"])["contender"] if timed else None


def cells(found: dict[str, Any]) -> list[list[str]]:
    """The rows of one result; the quickest is marked with a star. A contender that was wrong has no figures."""
    first = best(found)
    rows = []
    for r in found["rows"]:
        name = f"{'*' if r['contender'] == first else ' '} {r['contender']}"
        if r["p50_ms"] is None:
            rows.append([name, "WRONG" if r["wrong"] else "-", *[""] * 6])
            continue
        times = [significant(r[p]) for p in ("p20_ms", "p50_ms", "p80_ms")]
        memory = "-" if r["memory"] is None else f"{r['memory'] / 2**20:.1f}"
        error = "-" if r["error"] is None else f"{r['error']:.2f}"
        rows.append([name, *times, significant(r["gflops"]), f"{r['share']:.0%} {found['bound']}", memory, error])
    return rows


def significant(number: float) -> str:
    """Three significant digits, without an exponent."""
    if number <= 0 or number >= 100:
        return f"{number:.0f}"
    return f"{number:.{2 - math.floor(math.log10(number))}f}"


def lines(found: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """All results as (line, what it is): "header", "title", "best", "wrong" or ""."""
    said = [(_aligned(HEADERS), "header")]
    for f in found:
        said.append((title(f), "title"))
        for row in cells(f):
            what = "best" if row[0].startswith("*") else "wrong" if row[1] == "WRONG" else ""
            said.append((_aligned(row), what))
    return said


def _aligned(row: Sequence[str]) -> str:
    cells = (c.ljust(-w) if w < 0 else c.rjust(w) for c, w in zip(row, WIDTHS, strict=True))
    return " ".join(cells).rstrip()


STYLES = {"header": "bold", "title": "cyan", "best": "bold green", "wrong": "bold red", "": ""}


def show(found: Sequence[dict[str, Any]]) -> None:
    """Print all results, in colour where rich is installed and the output is a terminal."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        print("\n".join(line for line, _ in lines(found)))
        return
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for line, what in lines(found):
        console.print(line, style=STYLES[what])


def notes(found: Sequence[dict[str, Any]]) -> list[str]:
    """What the table has no room for: who took no part and why, and what was wrong."""
    absent: dict[tuple[str, str], int] = {}
    for f in found:
        why = dict(f["absent"]) | {r["contender"]: r["problem"] for r in f["rows"] if r["problem"] and not r["wrong"]}
        for name, reason in why.items():
            absent[name, reason] = absent.get((name, reason), 0) + 1
    said = [f"  {name}: {reason} ({n} of {len(found)})" for (name, reason), n in absent.items()]
    wrong = [
        f"WRONG, and so without a time: {r['contender']} in {f['work']}\n    {r['problem']}"
        for f in found
        for r in f["rows"]
        if r["wrong"]
    ]
    return (["Took no part:", *said] if said else []) + wrong


def summary(found: Sequence[dict[str, Any]]) -> list[str]:
    """Our best against each peer, by kind and pass: the geometric mean over works of the median ratio of a round."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for f in found:
        ours = min((r for r in f["rows"] if r["ours"] and r["ms"]), key=lambda r: r["p50_ms"], default=None)
        for r in f["rows"]:
            if ours and not r["ours"] and r["ms"]:
                ratio = statistics.median(theirs / own for theirs, own in zip(r["ms"], ours["ms"], strict=True))
                ratios.setdefault((f"{f['kind']} {f['what']}", r["contender"]), []).append(ratio)
    rows = [
        (what, peer, f"{statistics.geometric_mean(r):.2f} x", f"{min(r):.2f}", f"{max(r):.2f}", str(len(r)))
        for (what, peer), r in ratios.items()
    ]
    if not rows:
        return []
    headers = ("attn is quicker", "than", "by", "least", "most", "cases")
    return [table(headers, rows, left=2, indent="")]


def changed(found: Sequence[Change]) -> list[str]:
    """What --compare says."""
    rows = [
        (
            c.work,
            c.contender,
            c.words or f"{c.ratio:.2f} x",
            f"{c.allowed:.2f}",
            "SLOWER" if c.slower else "quicker" if c.quicker else "",
        )
        for c in found
    ]
    headers = ("against the earlier run", "", "time", "noise", "")
    if not rows:
        return ["Nothing in common with the earlier run."]
    blind = sum(c.allowed > SEEN for c in found)
    said = f"{blind} of {len(found)} are too noisy to show that ours takes {SEEN} times as long: give --seconds more."
    return [table(headers, rows, left=2, indent=""), *([said] if blind else [])]


def write_csv(path: Path, found: Sequence[dict[str, Any]]) -> None:
    """One line for each contender of each work."""
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        out.writeheader()
        for f in found:
            for r in f["rows"]:
                out.writerow({"work": f["work"], "bound": f["bound"], **r})
