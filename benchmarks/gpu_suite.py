"""Everything that has to be seen on a GPU, in one command and under 8 minutes: `python -m attn.benchmarks.gpu_suite`.

1. For each of our backends for GPUs: long sequences and tensors beyond 2^31 elements by laws, bitwise repeats, other
   streams, CUDA-graph replay with fresh dropout, torch.compile; then the feature matrix at real sizes against float64.
2. compute-sanitizer on a few cases, where it is installed.
3. Every preset of `bench` beside every kernel of PyTorch's `scaled_dot_product_attention`, FlexAttention and what
   libraries are installed, in races.

Single failures are recorded and do not end it. It writes one JSON, which `bench --compare` reads too, and prints a
short table last; `--plot FOLDER` draws the JSON afterwards. Entries for `attn/backends/proven.py` are printed where
every cell of an architecture ran and passed. Without a GPU it runs in small, in Triton's interpreter
(TRITON_INTERPRET=1), which tests the suite and times nothing of interest.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import attn
from attn.backends import BACKENDS, load
from attn.benchmarks import gpu_timing, report, sanitizer
from attn.benchmarks.machine import clocks, machine
from attn.spec import Operands, arch_of
from attn.testing import assert_case, assert_verdicts, cases, laws, matrix, verify

SECONDS = 460.0
"""Time for the whole suite."""
SHARES = {"matrix": 0.4, "sanitizer": 0.15}
"""Of it at most; the timings have the rest."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PASSES = {"attention": ("forward", "backward"), "varlen": ("forward", "backward"), "decode": ("decode",)}


@dataclass
class Cell:
    """One check of the matrix."""

    backend: str
    name: str
    dtype: str
    passes: tuple[str, ...]
    ok: bool
    seconds: float
    error: str = ""


@dataclass
class Suite:
    """One run on one device."""

    device: str
    backend: str
    until: float
    small: bool
    cells: list[Cell] = field(default_factory=list)
    left_out: int = 0
    """Cells that no time was left for."""

    def check(self, name: str, dtype: torch.dtype, passes: tuple[str, ...], run: Callable[[], object]) -> None:
        """Run one check and record how it went."""
        start, error = time.monotonic(), ""
        try:
            run()
        except Exception as what:  # the suite goes on: what failed stands in its JSON
            error = f"{type(what).__name__}: {str(what)[:500]}"
            if not isinstance(what, AssertionError):
                error += "\n" + traceback.format_exc(limit=-3)
        seconds = round(time.monotonic() - start, 3)
        self.cells.append(
            Cell(self.backend, name, str(dtype).removeprefix("torch."), passes, not error, seconds, error)
        )
        if error:
            print(f"FAILED {self.backend} {name}: {error.splitlines()[0]}", flush=True)


def check_all(suite: Suite) -> None:
    """What no case can show, then random cases of every feature at real sizes, until the time is over."""
    for name, dtype, run in special(suite):
        suite.check(name, dtype, ("forward", "backward"), run)
    engine, arch = load(suite.backend), arch_of(suite.device, None)
    sizes = (1, 31, 33, 40) if suite.small else verify.DEEP_LENGTHS
    dims = (8, 20) if suite.small else verify.DEEP_HEAD_DIMS
    for op in PASSES:
        for dtype in DTYPES:
            count = 1 if suite.small else verify.DEEP_CASES[op]
            for case in cases(count, 1, ops=(op,), dtypes=(dtype,), device=suite.device, sizes=sizes, head_dims=dims):
                if engine.why_not(case.spec._replace(arch=arch)) is not None:
                    continue
                if time.monotonic() > suite.until:
                    suite.left_out += 1
                    continue
                suite.check(str(case), dtype, PASSES[op], lambda case=case: assert_case(case, suite.backend))


def special(suite: Suite) -> Iterator[tuple[str, torch.dtype, Callable[[], None]]]:
    """(name, dtype, check) of what needs more than one call."""
    engine = load(suite.backend)

    def repeats() -> None:
        x = _call(suite, 40 if suite.small else 1000)
        residuals = engine.forward(x)
        first = engine.backward(x, residuals, residuals[0], None, None, False)
        for _ in range(2 if suite.small else 200):
            again = engine.forward(x)
            gradients = engine.backward(x, residuals, residuals[0], None, None, False)
            same = zip((*residuals, *first[:3]), (*again, *gradients[:3]), strict=True)
            if not all(torch.equal(a, b) for a, b in same):
                raise AssertionError("a repeat differs in some bit")

    def long() -> None:
        x = _call(suite, 70 if suite.small else 16384)
        assert_verdicts(_linear_laws(suite.backend, x), "long")

    yield "bitwise repeats", torch.bfloat16, repeats
    yield "long sequence by laws", torch.bfloat16, long
    if suite.device == "cuda":
        yield from _on_gpu(suite)


def _call(suite: Suite, L: int, H: int = 2, D: int = 64) -> Operands:
    """A causal call in bfloat16."""
    shape = (1, L, H, D)
    q, k, v = (torch.randn(shape, device=suite.device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    return Operands(q, k, v, scale=D**-0.5, right=0)


def _on_gpu(suite: Suite) -> Iterator[tuple[str, torch.dtype, Callable[[], None]]]:
    name, engine = suite.backend, load(suite.backend)

    def huge() -> None:
        x = _call(suite, (1 << 31) // (16 * 64) + 128, H=16)
        x = x._replace(q=torch.zeros_like(x.q), left=256)
        out = engine.forward(x)[0]
        assert_verdicts([laws.running_mean(x._replace(v=x.v[:, :, :256]), out[:, :, :256])], "beyond 2^31 elements")
        tail = x.v[:, :, -257:].double().mean(2)
        if float((out[:, :, -1].double() - tail).abs().max()) > 8 * torch.finfo(torch.bfloat16).eps:
            raise AssertionError("the last row is not the mean of its window")

    def stream() -> None:
        x = _call(suite, 500)
        want = engine.forward(x)[0]
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            got = engine.forward(x)[0]
        torch.cuda.current_stream().wait_stream(other)
        if not torch.equal(got, want):
            raise AssertionError("another stream gives other numbers")

    def graph() -> None:
        q = torch.randn(1, 2, 256, 64, device="cuda", dtype=torch.bfloat16)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            attn.attention(q, q, q, dropout_p=0.5, backend=name)
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            out = attn.attention(q, q, q, dropout_p=0.5, backend=name)
        captured.replay()
        first = out.clone()
        captured.replay()
        if torch.equal(first, out):
            raise AssertionError("two replays dropped the same probabilities")

    def compiled() -> None:
        def run(t: torch.Tensor) -> torch.Tensor:
            return attn.attention(t, t, t, mask=attn.masks.causal(), backend=name)

        q = torch.randn(1, 2, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        if not torch.equal(run(q), torch.compile(run, fullgraph=True)(q)):
            raise AssertionError("compiled gives other numbers")

    if torch.cuda.get_device_properties(0).total_memory > 40 << 30:
        yield "beyond 2^31 elements", torch.bfloat16, huge
    yield "another stream", torch.bfloat16, stream
    yield "CUDA graph, fresh dropout", torch.bfloat16, graph
    yield "torch.compile", torch.bfloat16, compiled


def _linear_laws(name: str, x: Operands) -> list[Any]:
    """Laws of a length whose weights would not fit."""
    engine = load(name)
    d_out = torch.randn_like(x.q)
    out, m, l = engine.forward(x)
    dq, dk, dv, _ = engine.backward(x, (out, m, l), d_out, None, None, False)
    ones = x._replace(v=torch.ones_like(x.v))
    return [
        laws.products(x, dq, dk, d_out),
        laws.values_gradient(x, dv, d_out, l),
        laws.unit_values(ones, engine.forward(ones)[0], l),
    ]


def sanitized_cases(backends: tuple[str, ...], device: str) -> int:
    """What compute-sanitizer watches: a few small cases, each held against float64. Exit status 1 if one is wrong."""
    where = {"device": device, "arch": arch_of(device, None)}
    suites = [Suite(device, backend, 0.0, True) for backend in backends]
    for suite in suites:
        for name in sanitizer.SITUATIONS:
            case = matrix.situation(name, torch.float32 if device == "cpu" else torch.bfloat16, **where)
            suite.check(str(case), case.spec.dtype, (), lambda case=case, of=suite.backend: assert_case(case, of))
    return 0 if all(cell.ok for suite in suites for cell in suite.cells) else 1


def proven(suite: Suite) -> list[str]:
    """Entries for `attn/backends/proven.py`: the passes of which every cell ran and passed, by dtype."""
    if suite.device == "cpu" or suite.left_out:
        return []
    good: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for cell in suite.cells:
        for which in cell.passes:
            good[cell.dtype, which].append(cell.ok)
    arch = arch_of("cuda", None)
    return [f'("{suite.backend}", "{arch}", torch.{d}, "{p}"),' for (d, p), oks in sorted(good.items()) if all(oks)]


def backends_here() -> tuple[str, ...]:
    """Ours for GPUs that work on this machine."""
    return tuple(name for name in BACKENDS if load(name).needs_proof and load(name).missing is None)


def plot(path: Path, folder: Path) -> None:
    """Draw what the suite wrote: a PNG for each preset, of the published sweep one for each pass."""
    from attn.benchmarks import plots

    found = json.loads(path.read_text())
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in found["results"]:
        if any(row["p50_ms"] for row in result["rows"]):
            groups[result["preset"] + (f"-{result['what']}" if result["preset"] == "paper" else "")].append(result)
    folder.mkdir(parents=True, exist_ok=True)
    for name, results in groups.items():
        plots.draw(found | {"results": results}, folder / f"{name}.png")
        print(f"Figure: {folder / f'{name}.png'}")


def main(argv: list[str] | None = None) -> int:
    """Runs the suite. Exit status 1 if a check failed, 2 where no backend can run at all."""
    parser = argparse.ArgumentParser(prog="python -m attn.benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--backend", action="append", default=[], help="only this one; may be repeated")
    parser.add_argument("--json", type=Path, default=Path("gpu-suite.json"), help="where the results go")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="run nothing; draw what --json holds")
    parser.add_argument("--small", action="store_true", help="a few tiny cases, to test the suite itself")
    parts = ("all", "matrix", "sanitizer", "timings", "cases")
    parser.add_argument("--part", choices=parts, default="all", help="only this one, with all of the time")
    args = parser.parse_args(argv)
    if args.plot:
        plot(args.json, args.plot)
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backends = tuple(args.backend) or backends_here()
    missing = {name: load(name).missing for name in backends if load(name).missing} or (
        {} if backends else {"none": ""}
    )
    if missing:
        said = "; ".join(f"backend {name} {why}" for name, why in missing.items() if why)
        print(said or "no backend for GPUs works here; python -m attn info says why", file=sys.stderr)
        return 2
    if args.part == "cases":
        return sanitized_cases(backends, device)
    return _run(args, backends, device)


def _run(args: argparse.Namespace, backends: tuple[str, ...], device: str) -> int:
    start, small = time.monotonic(), args.small or device == "cpu"
    shares = {part: float(args.part == part) for part in SHARES} if args.part != "all" else SHARES
    suites = []
    for n, backend in enumerate(backends):
        until = start + SECONDS * shares["matrix"] * (n + 1) / len(backends)
        suites.append(Suite(device, backend, until, small))
        if shares["matrix"]:
            check_all(suites[-1])
    results: dict[str, Any] = {"machine": machine(), "backends": backends, "sanitizer": sanitizer.missing() or []}
    if shares["sanitizer"] and not results["sanitizer"]:
        found = sanitizer.run(backends, time.monotonic() + SECONDS * shares["sanitizer"])
        results["sanitizer"] = [asdict(one) for one in found]
    timed = gpu_timing.Timings({}, [], [])
    if args.part in ("all", "timings"):
        timed = gpu_timing.timings(backends, device, small, start + SECONDS)
    cells = [cell for suite in suites for cell in suite.cells]
    results |= asdict(timed) | {"matrix": [asdict(c) for c in cells], "clocks": clocks()}
    results["matrix_left_out"] = {suite.backend: suite.left_out for suite in suites}
    results["proven"] = [entry for suite in suites for entry in proven(suite)]
    results["seconds"] = round(time.monotonic() - start, 1)
    args.json.write_text(json.dumps(results, indent=1))
    print(_told(results, args.json))
    wrong = any(row["wrong"] and row["ours"] for result in timed.results for row in result["rows"])
    watched = results["sanitizer"] if isinstance(results["sanitizer"], list) else []
    return 1 if wrong or not all(c.ok for c in cells) or any(one["ok"] is False for one in watched) else 0


def _told(results: dict[str, Any], path: Path) -> str:
    """The short table."""
    cells, watched = results["matrix"], results["sanitizer"]
    failed, left_out = sum(not c["ok"] for c in cells), sum(results["matrix_left_out"].values())
    words = {True: "clean", False: "FAILED", None: "not done"}
    lines = [f"matrix: {len(cells)} cells, {failed} failed, {left_out} left out for lack of time"]
    if left_out:
        lines.append("  --part matrix --backend NAME has more of it; entries are printed where all ran")
    if isinstance(watched, str):
        lines.append(f"sanitizer: {watched}")
    else:
        lines += [f"sanitizer: {one['kind']} on {one['backend']}: {words[one['ok']]}" for one in watched]
    lines.append(f"timings: {len(results['results'])} works, {len(results['left_out'])} left out for lack of time")
    told = [*lines, *results["proven"], *report.summary(results["results"])]
    told += [line for line in report.notes(results["results"]) if line.startswith("WRONG")]
    return "\n".join([*told, f"{results['seconds']:.0f} s; {path}"])


if __name__ == "__main__":
    sys.exit(main())
