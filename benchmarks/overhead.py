"""What calling attn costs beside calling PyTorch, on one CPU thread: `python -m attn.benchmarks.overhead`.

The sizes are so small that arithmetic hardly counts: what is measured is the way to the kernel. All contenders take
turns, round by round, and each is judged by its quickest round and by its median: other work on the machine can only
slow a round down.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import attn

BATCH, LENGTH, WIDTH, HEADS = 8, 16, 64, 4
CALLS = 5  # per round: short enough to fall between two interruptions


@dataclass(frozen=True)
class Row:
    """One comparison, times in µs per call."""

    what: str
    torch_us: float
    attn_us: float
    torch_median_us: float
    attn_median_us: float
    target: float
    is_ratio: bool

    @property
    def value(self) -> float:
        """attn / torch, or the µs that attn adds."""
        return self.attn_us / self.torch_us if self.is_ratio else self.attn_us - self.torch_us

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.value <= self.target


def _module_pairs() -> list[tuple[str, Callable[[], object], Callable[[], object], float, bool]]:
    torch.manual_seed(0)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    stock = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    ours = attn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    ours.load_state_dict(stock.state_dict())

    def call(module: nn.Module, need_weights: bool, fast_path: bool) -> Callable[[], object]:
        def run() -> object:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            with torch.no_grad():
                return module(x, x, x, need_weights=need_weights)[0]

        return run

    return [
        (
            f"module, eval, {'with' if weights else 'no'} weights, fast path {'on' if fast_path else 'off'}",
            call(stock, weights, fast_path),
            call(ours, weights, fast_path),
            1.2 if fast_path else 1.0,
            True,
        )
        for weights in (False, True)
        for fast_path in (False, True)
    ]


def _function_pairs() -> list[tuple[str, Callable[[], object], Callable[[], object], float, bool]]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(BATCH, HEADS, LENGTH, WIDTH // HEADS, requires_grad=True) for _ in range(3))
    d_out = torch.randn(BATCH, HEADS, LENGTH, WIDTH // HEADS)

    def without(f: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return f(q, k, v)

        return run

    def both(f: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(f(q, k, v), (q, k, v), d_out)

    theirs, ours = F.scaled_dot_product_attention, attn.scaled_dot_product_attention
    return [
        ("function, no gradients", without(theirs), without(ours), 15.0, False),
        ("function, forward", lambda: theirs(q, k, v), lambda: ours(q, k, v), 30.0, False),
        ("function, forward and backward", both(theirs), both(ours), 60.0, False),
    ]


def measure(rounds: int) -> list[Row]:
    """Every comparison, in turns of CALLS calls each."""
    pairs = [*_module_pairs(), *_function_pairs()]
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in pairs]
    for r in range(rounds + 1):
        for (_, theirs, ours, _, _), seen in zip(pairs, times, strict=True):
            for which in (0, 1) if r % 2 else (1, 0):
                us = _us_per_call((theirs, ours)[which])
                if r:  # the first round warms up
                    seen[which].append(us)
    return [
        Row(what, min(a), min(b), statistics.median(a), statistics.median(b), target, is_ratio)
        for (what, _, _, target, is_ratio), (a, b) in zip(pairs, times, strict=True)
    ]


def _us_per_call(call: Callable[[], object]) -> float:
    call()  # the other contender has just used the caches
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def report(rows: Sequence[Row]) -> str:
    """The table."""
    from attn.cli.table import table

    cells = []
    for row in rows:
        unit = "{:.2f} x" if row.is_ratio else "{:+.1f} µs"
        median = row.attn_median_us / row.torch_median_us if row.is_ratio else row.attn_median_us - row.torch_median_us
        cells.append(
            (
                row.what,
                f"{row.torch_us:.1f}",
                f"{row.attn_us:.1f}",
                unit.format(row.value),
                unit.format(median),
                f"<= {unit.format(row.target)}",
                "met" if row.met else "NOT MET",
            )
        )
    headers = ("what", "torch, µs", "attn, µs", "attn against torch", "by medians", "target", "")
    title = f"batch {BATCH}, length {LENGTH}, {WIDTH} features, {HEADS} heads, float32, one CPU thread; quickest rounds"
    return f"{title}\n{table(headers, cells)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m attn.benchmarks.overhead", description=(__doc__ or "").strip())
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures and the machine to PATH")
    parser.add_argument("--rounds", type=int, default=1000, help=f"rounds of {CALLS} calls (1000)")
    args = parser.parse_args(argv)
    threads, fast_path = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    torch.set_num_threads(1)
    try:
        rows = measure(args.rounds)
    finally:
        torch.set_num_threads(threads)
        torch.backends.mha.set_fastpath_enabled(fast_path)
    print(report(rows))
    if args.json:
        machine = {"platform": platform.platform(), "python": platform.python_version(), "torch": torch.__version__}
        found = [asdict(row) | {"value": row.value, "met": row.met} for row in rows]
        args.json.write_text(json.dumps({"attn": attn.__version__, **machine, "rows": found}, indent=2) + "\n")
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
