"""`python -m attn bench`: speed and memory beside the peers, each checked before it is timed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn.cli.progress import progress

if TYPE_CHECKING:  # the command is listed where torch does not load
    from attn.benchmarks.compare import Change
    from attn.benchmarks.harness import Result, Who
    from attn.benchmarks.work import Work

PRESETS = ("quick", "paper", "bert", "gpt", "vit", "decode")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to time, whom, and where the figures go."""
    parser.add_argument("work", nargs="*", metavar="WORK", help="the line of one work or case, as tables print it")
    parser.add_argument("--preset", choices=PRESETS, default="quick", help="a set of works (quick)")
    sweep = parser.add_argument_group("sweeps: the works of the preset, once for each value")
    for name, metavar in (("seqlen", "N"), ("head-dim", "N"), ("heads", "N"), ("batch", "N")):
        sweep.add_argument(f"--{name}", metavar=f"{metavar},{metavar}", type=_numbers)
    for name, example in (("dtype", "float32,bfloat16"), ("mask", "full,causal"), ("pass", "forward,backward,both")):
        sweep.add_argument(f"--{name}", metavar=example, type=_words)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where (cuda if there is a GPU)")
    parser.add_argument("--backend", action="append", default=[], metavar="NAME", help="of ours, only this one")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME", help="of the others, only this one")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for the rounds of each work (2)")
    parser.add_argument("--list", action="store_true", help="print the lines of the works; time nothing")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything, with the machine, to PATH")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write a line for each contender to PATH")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw bars, lines and the roofline to a PNG")
    parser.add_argument(
        "--compare", type=Path, metavar="PATH", help="the JSON of an earlier run: 1 where ours is slower"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table; 1 if a check failed or --compare found something slower, 2 for what is not understood."""
    from attn.benchmarks import compare, harness, machine, report, roofline, timer

    try:
        works = _works(args)
        who = _who(args)
        about = machine.machine()
        before = _earlier(args.compare, about) if args.compare else {}
    except ValueError as error:
        print(f"python -m attn bench: {error}", file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(map(str, works)))
        return 0
    clock = timer.timer_for(works[0].device)
    results: list[Result] = []
    changes: list[Change] = []
    device, dtypes = works[0].device, {w.dtype for w in works}
    with progress("bench", harness.VISITS * len(works)) as advance:
        roof = roofline.measure(clock, device, dtypes)
        for known in harness.visits(works, clock, args.seconds, who, advance):
            results = known
            roof = roof.or_better(roofline.measure(clock, device, dtypes))
        for n, work in enumerate(works):
            then = before.get(str(work))
            changed = compare.changes(results[n], then)
            if any(c.slower for c in changed):  # noise seldom strikes twice
                (results[n],) = harness.measure([work], clock, args.seconds, who)
                changed = _milder(changed, compare.changes(results[n], then))
            changes += changed
    found = [report.plain(result, roof) for result in results]
    report.show(found)
    print()
    for part in (report.summary(found), report.notes(found), report.changed(changes) if args.compare else []):
        if part:
            print("\n".join([*part, ""]))
    reached = ", ".join(f"{dtype} {gflops:.0f} GFLOP/s" for dtype, gflops in roof.gflops.items())
    print(f"Roofline of this run: {reached} (matrix product), {roof.gbytes:.1f} GB/s (copy).")
    print("Times from cold caches; roofline: share of what these two allow; error: the largest over what is allowed.")
    if device == "cpu":
        print("Memory that a call frees stays with the process, and the next call finds it there.")
    _write(args, about, {"gflops": roof.gflops, "gbytes": roof.gbytes}, found)
    wrong = any(row["wrong"] and row["ours"] for f in found for row in f["rows"])
    return 1 if wrong or any(c.slower for c in changes) else 0


def _milder(first: Sequence[Change], second: Sequence[Change]) -> list[Change]:
    """Of two comparisons of one work, for each contender the one with less to say against it."""
    by_name = {c.contender: c for c in first}
    return [min(c, by_name.get(c.contender, c), key=lambda c: c.ratio / c.allowed) for c in second]


def _works(args: argparse.Namespace) -> list[Work]:
    """What to time, on one device."""
    import torch

    from attn.benchmarks import presets, work

    given = {field: getattr(args, option) for option, field in presets.SWEPT.items()}
    values = {field: value for field, value in given.items() if value is not None}
    if args.work:
        if values:
            raise ValueError("a line says all there is to say: leave out --seqlen and the other sweeps")
        works = [work.parse(" ".join(args.work))]
    else:
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        works, refused = presets.swept(list(presets.PRESETS[args.preset](device)), values)
        for why in dict.fromkeys(refused):
            print(f"left out: {why}", file=sys.stderr)
    if works[0].device not in ("cpu", "cuda") or (works[0].device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device is {works[0].device!r}, and torch finds no such device; --device cpu runs anywhere")
    return works


def _who(args: argparse.Namespace) -> Who:
    from attn.backends import load
    from attn.benchmarks import harness, peers

    for name in args.backend:
        missing = load(name).missing
        if missing is not None:
            raise ValueError(f"backend {name} does not work here: {missing}")
    for name in args.peer:
        if name not in peers.PEERS:
            raise ValueError(f"peer is {name!r}; known: {', '.join(peers.PEERS)}")
    return harness.Who(tuple(args.backend), tuple(args.peer))


def _earlier(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The results of an earlier run by work."""
    from attn.benchmarks import compare

    try:
        found = json.loads(path.read_text())
        results = {f["work"]: f for f in found["results"]}
        then = found["machine"]
    except OSError as error:
        raise ValueError(f"--compare {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--compare {path}: not what bench --json writes") from None
    differs = compare.other_machine(about, then)
    if differs:
        raise ValueError(f"--compare {path}: taken on another machine ({differs}); times do not compare")
    return results


def _write(args: argparse.Namespace, about: dict[str, Any], roof: dict[str, Any], found: list[dict[str, Any]]) -> None:
    from attn.benchmarks import report

    everything = {"machine": about, "roofline": roof, "results": found}
    if args.json:
        args.json.write_text(json.dumps(everything, indent=1) + "\n")
    if args.csv:
        report.write_csv(args.csv, found)
    if args.plot:
        try:
            from attn.benchmarks import plots
        except ModuleNotFoundError as error:
            print(f"--plot needs {error.name}: pip install 'attn-kernels[bench]'", file=sys.stderr)
            return
        plots.draw(everything, args.plot)
        print(f"Figure: {args.plot}")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _words(text: str) -> list[str]:
    return text.split(",")
