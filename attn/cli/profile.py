"""`python -m attn profile`: where the time of one call, or of a function of yours, goes."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from attn.cli.table import table

if TYPE_CHECKING:  # the command is listed where torch does not load
    from attn.benchmarks.profiling import Profile
    from attn.benchmarks.work import Work

TOOLS = ("ncu", "nsys")
ROWS, NAME = 12, 60
EXAMPLE = "attention forward cpu float32 causal B=1 H=8 L=1024 D=64"
Step = Callable[[], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The target and where its trace goes."""
    parser.add_argument(
        "target",
        nargs="*",
        metavar="TARGET",
        help="the line of a work as `bench --list` prints it, the line of a case, or module:function, a function "
        "without arguments that does one step",
    )
    parser.add_argument("--backend", metavar="NAME", help="of ours, this one")
    parser.add_argument("--steps", type=int, default=5, help="steps to trace (5)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write trace.json (Chrome, Perfetto) and profile.json")
    parser.add_argument("--tool", choices=TOOLS, help="run the command of this tool instead of printing it")
    parser.add_argument("--once", action="store_true", help="only run the steps, in NVTX ranges: what a tool is given")


def run(args: argparse.Namespace) -> int:
    """Prints where time goes; 1 if the call computes something wrong, 2 for a target that is not understood."""
    from attn.benchmarks import profiling

    target = " ".join(args.target) or EXAMPLE
    try:
        if args.steps < 1:
            raise ValueError(f"--steps is {args.steps}; at least 1")
        work = None if ":" in target and "|" not in target else _work(target)
        step, about = _of_function(target) if work is None else _of_work(work, args.backend)
        if args.tool and not shutil.which(args.tool):
            raise ValueError(f"{args.tool} is not on the path; it comes with the CUDA toolkit")
    except ValueError as error:
        print(f"python -m attn profile: {error}", file=sys.stderr)
        return 2
    except AssertionError as error:
        print(f"python -m attn profile: wrong, and so not profiled: {error}", file=sys.stderr)
        return 1
    if args.once:
        with profiling.ranges():
            for _ in range(args.steps):
                step()
        return 0
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    found = profiling.run(step, args.steps, args.out / "trace.json" if args.out else None)
    print(f"{target}\n")
    print(_text(found))
    print("\n".join([*about(found), ""]))
    if args.out:
        (args.out / "profile.json").write_text(json.dumps(dataclasses.asdict(found), indent=1) + "\n")
        print(f"Trace: {args.out / 'trace.json'}; open it at ui.perfetto.dev or chrome://tracing.")
    else:
        print("--out DIR writes the trace for Chrome or Perfetto.")
    return _tools(found, target, args)


def _work(line: str) -> Work:
    from attn.benchmarks.work import parse

    return parse(line)


def _of_work(work: Work, backend: str | None) -> tuple[Step, Callable[[Profile], list[str]]]:
    """What runs, after its check, and what its roofline says."""
    import torch

    from attn.backends import load
    from attn.benchmarks import harness, roofline, timer

    if work.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', and torch finds no GPU")
    if backend is not None and load(backend).missing is not None:
        raise ValueError(f"backend {backend} does not work here: {load(backend).missing}")
    ready = harness.lineup(work, harness.Who((backend,) if backend else (), ("sdpa math",)))
    ours = [c for c in ready.contenders if c.ours]
    if not ours:
        raise ValueError(f"attn {backend}: {ready.absent[f'attn {backend}']}")
    first = ours[0]
    with first.inside():
        ready.check(first)
    once = ready.runs[first.name]()

    def step() -> object:
        with first.inside():
            return once()

    def about(_: Profile) -> list[str]:
        clock = timer.timer_for(work.device)
        roof = roofline.measure(clock, work.device, {work.dtype})
        sample = clock.prepared(step)
        ms = sorted(clock.sample(sample) for _ in range(harness.ROUNDS[0]))[harness.ROUNDS[0] // 2]
        cost = ready.cost
        return [
            f"Roofline: {cost.flops / 1e9:.4g} GFLOP and at least {cost.bytes / 1e6:.4g} MB moved, "
            f"{cost.flops / max(1, cost.bytes):.3g} FLOP per byte.",
            f"  This machine multiplies matrices at {roof.gflops[work.dtype]:.4g} GFLOP/s and copies at "
            f"{roof.gbytes:.3g} GB/s: bound by {roof.bound(cost, work.dtype)}, at least "
            f"{roof.floor_ms(cost, work.dtype):.3g} ms.",
            f"  Without the profiler, from cold caches: {ms:.3g} ms, {cost.flops / ms / 1e6:.4g} GFLOP/s, "
            f"{roof.floor_ms(cost, work.dtype) / ms:.0%} of the roofline.",
        ]

    return step, about


def _of_function(target: str) -> tuple[Step, Callable[[Profile], list[str]]]:
    """A function of the user's, found by name, and the operations that FlopCounterMode counts in it."""
    module, _, name = target.partition(":")
    try:
        step = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise ValueError(f"no module {module!r}: it is looked for in this folder and where Python looks") from None
    except AttributeError:
        raise ValueError(f"module {module!r} has no {name!r}") from None
    if not callable(step):
        raise ValueError(f"{target} is no function")

    def about(found: Profile) -> list[str]:
        from attn.benchmarks import profiling

        count = profiling.counted(step)
        if count is None:
            return ["FlopCounterMode cannot follow this function."]
        rate = count / max(found.wall, 1e-9) / 1e6
        return [f"FlopCounterMode counts {count / 1e9:.4g} GFLOP in a step: {rate:.4g} GFLOP/s under the profiler."]

    return step, about


def _text(found: Profile) -> str:
    """The tables."""
    total = sum(found.shares.values()) or 1.0
    shares = [(name, f"{ms:.3f}", f"{ms / total:.0%}") for name, ms in found.shares.items()]
    what = "GPU kernel" if found.device else "CPU operation"
    parts = [
        f"{found.wall:.3f} ms for a step under the profiler, over {found.steps} steps.",
        table(("where time goes", "ms", ""), shares, indent=""),
        _table(f"{what}, time of its own", found.kernels),
    ]
    if found.ranges:
        parts.append(_table("range of attn, with all inside", found.ranges))
    if found.device:
        parts.append(f"Launch gaps: {found.idle:.3f} ms of a step without any kernel, {found.idle / found.wall:.0%}.")
    else:
        parts.append(f"Outside of any operation (Python): {max(0.0, found.wall - total):.3f} ms of a step.")
    return "\n\n".join(parts)


def _table(title: str, rows: list[tuple[str, float, int]]) -> str:
    shown = [
        (name if len(name) <= NAME else f"{name[: NAME - 1]}…", f"{ms:.3f}", str(n)) for name, ms, n in rows[:ROWS]
    ]
    rest = sum(ms for _, ms, _ in rows[ROWS:])
    if rest:
        shown.append((f"{len(rows) - ROWS} more", f"{rest:.3f}", ""))
    return table((title, "ms", "calls"), shown, indent="")


def _short(name: str) -> str:
    return name if len(name) <= NAME else f"{name[: NAME - 1]}…"


def _tools(found: Profile, target: str, args: argparse.Namespace) -> int:
    """Prints, or runs, what looks into the kernels themselves."""
    if not found.device:
        print("ncu and nsys look into GPU kernels, and this ran on a CPU.")
        return 2 if args.tool else 0
    commands = tool_commands(found.names, target, args.backend, args.out or Path())
    if args.tool:
        return subprocess.run(commands[args.tool]).returncode
    for tool, command in commands.items():
        print(f"{tool if shutil.which(tool) else f'{tool} (not on the path)'}: {shlex.join(command)}")
    return 0


def tool_commands(names: list[str], target: str, backend: str | None, folder: Path) -> dict[str, list[str]]:
    """The commands of ncu and nsys for this target; ncu looks at kernels of these names alone."""
    chosen = ["--backend", backend] if backend else []
    again = [sys.executable, "-m", "attn", "profile", *chosen, "--once", "--steps", "3", *target.split()]
    functions = sorted(
        {name.removeprefix("void ").partition("<")[0].partition("(")[0].split("::")[-1] for name in names}
    )
    only = ["--kernel-name", f"regex:^({'|'.join(functions)})$"] if functions else []
    return {
        "ncu": ["ncu", "--set", "full", *only, "--launch-count", "20", "-o", str(folder / "attn-ncu"), *again],
        "nsys": ["nsys", "profile", "--trace", "cuda,nvtx", "-o", str(folder / "attn-nsys"), *again],
    }
