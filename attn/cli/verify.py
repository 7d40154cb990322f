"""`python -m attn verify`: every backend against the reference on this machine. What to run first on a new GPU."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn.cli.progress import progress
from attn.cli.table import table

if TYPE_CHECKING:  # the command is listed where torch does not load
    from attn.testing.verify import Cell

LONGEST = 20
"""Failures that are printed in full."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A case, or what to look at."""
    parser.add_argument(
        "case", nargs="*", metavar="CASE", help="the line of one case, as a failure prints it: only that"
    )
    parser.add_argument("--backend", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--deep", action="store_true", help="also random calls up to length 1024: minutes")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every cell to PATH")


def run(args: argparse.Namespace) -> int:
    """Prints a table of the worst errors; 1 if any was not allowed, 2 for a case or backend that is not understood."""
    from attn.backends import load
    from attn.testing import verify

    backends = tuple(args.backend)
    try:
        for name in backends:
            if load(name).missing is not None:
                raise ValueError(f"backend {name} does not work here: {load(name).missing}")
        line = " ".join(args.case)
        planned = list(verify.replay(line, backends) if line else verify.checks(backends, args.deep))
    except ValueError as error:
        print(f"python -m attn verify: {error}", file=sys.stderr)
        return 2
    start = time.monotonic()
    with progress("verify", len(planned)) as advance:
        cells = verify.run(planned, lambda cell: advance(f"{cell.backend} {cell.name}"))
    seconds = time.monotonic() - start
    print(_one_case(cells) if line else _all(cells))
    failures = [cell for cell in cells if cell.failed]
    for cell in failures[:LONGEST]:
        print(f"\nFAILED on {cell.backend}: {cell.message}")
        print(f'  python -m attn verify --backend {cell.backend} "{cell.case}"')
    if len(failures) > LONGEST:
        print(f"\nand {len(failures) - LONGEST} more failures (--json PATH has all)")
    print(f"\n{_summary(cells)}, {seconds:.1f} s")
    if not line:
        print(_stamped(cells))
    if args.json:
        args.json.write_text(json.dumps([_plain(cell) for cell in cells], indent=1) + "\n")
    return 1 if failures else 0


def _all(cells: Sequence[Cell]) -> str:
    """Rows by what a call uses, a column for each backend and device: the worst error over the dtypes."""
    columns = list(dict.fromkeys((c.backend, c.case.spec.device) for c in cells))
    rows: dict[str, dict[tuple[str, str], list[Cell]]] = {}
    for cell in cells:
        rows.setdefault(cell.name, {}).setdefault((cell.backend, cell.case.spec.device), []).append(cell)
    both = len({device for _, device in columns}) > 1
    headers = ["worst error / allowed", *(f"{name} ({device})" if both else name for name, device in columns)]
    body = [[name, *(_cell(row.get(column, [])) for column in columns)] for name, row in rows.items()]
    return table(headers, body)


def _cell(cells: Sequence[Cell]) -> str:
    ran = [cell for cell in cells if not cell.refused]
    if not ran:
        return "-"
    worst = max(cell.worst for cell in ran)
    return f"{worst:.2f}" if worst <= 1 else f"FAILED {worst:.3g}"


def _one_case(cells: Sequence[Cell]) -> str:
    rows = [(c.backend, "refused" if c.refused else f"{c.worst:.3g}", c.message if c.refused else "") for c in cells]
    return table(("backend", "worst error / allowed", ""), rows, left=3)


def _summary(cells: Sequence[Cell]) -> str:
    ran, failed = [c for c in cells if not c.refused], [c for c in cells if c.failed]
    refused = f", {len(cells) - len(ran)} refused (-)" if len(ran) < len(cells) else ""
    if failed:
        return f"{len(failed)} of {len(ran)} calls FAILED{refused}"
    worst = max(ran, key=lambda c: c.worst, default=None)
    words = f", worst error {worst.worst:.2f} of what is allowed ({worst.backend}, {worst.name})" if worst else ""
    return f"{len(ran)} calls, all right{words}{refused}"


def _stamped(cells: Sequence[Cell]) -> str:
    """Leaves the stamp of what passed on a GPU, and says so."""
    from attn.backends import proven
    from attn.testing import verify

    good, bad = verify.verdict_of_passes(list(cells))
    if not good and not bad:
        return "No GPU kernel was checked: there is no GPU that torch can use, or no kernel for it."
    written = proven.stamp(good, bad)
    names = sorted(f"{b} {str(d).removeprefix('torch.')} {p}" for b, _, d, p in good)
    if not written:
        return "The stamp could not be written to the user's cache folder: these kernels still run only when asked for."
    return f"From now on chosen by itself on this GPU: {', '.join(names) or 'nothing'}."


def _plain(cell: Cell) -> dict[str, Any]:
    return {
        "backend": cell.backend,
        "name": cell.name,
        "case": str(cell.case),
        "refused": cell.refused,
        "failed": cell.failed,
        "worst": cell.worst if cell.worst < float("inf") else None,
        "message": cell.message,
    }
