"""Everything that has to be seen on a GPU, in one command and under 8 minutes: `python -m attn.benchmarks.gpu_suite`.

1. The feature matrix at real sizes against float64, long sequences and tensors beyond 2^31 elements by laws, bitwise
   repeats, other streams, CUDA-graph replay with fresh dropout, torch.compile.
2. Timings beside every kernel of PyTorch's `scaled_dot_product_attention` and FlexAttention, interleaved in one run.

Single failures are recorded and do not end it. It writes one JSON and prints a short table last. Entries for
`attn/backends/proven.py` are printed where every cell of an architecture passed. Without a GPU it runs in small, in
Triton's interpreter (TRITON_INTERPRET=1), which tests the suite and times nothing of interest.
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
from attn.backends import load
from attn.benchmarks import gpu_timing
from attn.benchmarks.machine import clocks, machine
from attn.spec import Operands, arch_of
from attn.testing import assert_case, assert_verdicts, cases, laws, verify

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PASSES = {"attention": ("forward", "backward"), "varlen": ("forward", "backward"), "decode": ("decode",)}


@dataclass
class Cell:
    """One check of the matrix."""

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
    deadline: float
    small: bool
    cells: list[Cell] = field(default_factory=list)

    def check(self, name: str, dtype: torch.dtype, passes: tuple[str, ...], run: Callable[[], None]) -> None:
        """Run one check and record how it went."""
        start, error = time.monotonic(), ""
        try:
            run()
        except Exception as what:  # the suite goes on: what failed stands in its JSON
            error = f"{type(what).__name__}: {str(what)[:500]}"
            if not isinstance(what, AssertionError):
                error += "\n" + traceback.format_exc(limit=-3)
        seconds = round(time.monotonic() - start, 3)
        self.cells.append(Cell(name, str(dtype).removeprefix("torch."), passes, not error, seconds, error))
        if error:
            print(f"FAILED {name}: {error.splitlines()[0]}", flush=True)

    def late(self, share: float) -> bool:
        """Whether this part of the time is used up."""
        return time.monotonic() > self.deadline - (1 - share) * gpu_timing.SECONDS


def matrix(suite: Suite) -> None:
    """Random cases of every feature at real sizes, then what no case can show."""
    sizes = (1, 31, 33, 40) if suite.small else verify.DEEP_LENGTHS
    dims = (8, 20) if suite.small else verify.DEEP_HEAD_DIMS
    for op in PASSES:
        for dtype in DTYPES:
            count = 1 if suite.small else verify.DEEP_CASES[op]
            for case in cases(count, 1, ops=(op,), dtypes=(dtype,), device=suite.device, sizes=sizes, head_dims=dims):
                if suite.late(0.5):
                    return
                suite.check(str(case), dtype, PASSES[op], lambda case=case: _assert(case, suite.backend))
    for name, dtype, run in special(suite):
        suite.check(name, dtype, ("forward", "backward"), run)


def _assert(case: Any, backend: str) -> None:
    assert_case(case, backend)


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


def proven(suite: Suite) -> list[str]:
    """Entries for `attn/backends/proven.py`: the passes of which every cell passed, by dtype."""
    if suite.device == "cpu":
        return []
    good: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for cell in suite.cells:
        for which in cell.passes:
            good[cell.dtype, which].append(cell.ok)
    arch = arch_of("cuda", None)
    return [f'("{suite.backend}", "{arch}", torch.{d}, "{p}"),' for (d, p), oks in sorted(good.items()) if all(oks)]


def main(argv: list[str] | None = None) -> int:
    """Runs the suite. Exit status 1 if a check failed, 2 where the backend cannot run at all."""
    parser = argparse.ArgumentParser(prog="python -m attn.benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--json", type=Path, default=Path("gpu-suite.json"), help="where the results go")
    parser.add_argument("--small", action="store_true", help="a few tiny cases, to test the suite itself")
    parser.add_argument("--part", choices=("all", "matrix", "timings"), default="all")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    missing = load(args.backend).available()
    if missing is not None:
        print(f"backend {args.backend} {missing}", file=sys.stderr)
        return 2
    suite = Suite(device, args.backend, time.monotonic() + gpu_timing.SECONDS, args.small or device == "cpu")
    results: dict[str, Any] = {"machine": machine()}
    rows: list[gpu_timing.Timing] = []
    if args.part != "timings":
        matrix(suite)
    if args.part != "matrix":
        rows = gpu_timing.timings(args.backend, device, suite.small, suite.deadline)
    results |= {"matrix": [asdict(c) for c in suite.cells], "timings": [asdict(r) for r in rows], "clocks": clocks()}
    results["proven"] = proven(suite)
    args.json.write_text(json.dumps(results, indent=1))
    failed = [c for c in suite.cells if not c.ok]
    print(f"matrix: {len(suite.cells)} cells, {len(failed)} failed; {args.json}")
    print("\n".join(results["proven"]))
    print(gpu_timing.summary(rows, args.backend))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
