"""What this machine reaches in this run: a matrix product for operations, a copy for bytes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from attn.benchmarks.timer import Run, Timer
from attn.benchmarks.work import Cost

SIDE, FIRST_SIDE = {"cpu": 1024, "cuda": 8192}, 128
SLOW_MS = 50.0
"""A product of 16-bit matrices on a CPU that took so long is the last: without such products one takes seconds."""
COPIED = {"cpu": 64 << 20, "cuda": 1 << 30}
SAMPLES = 3


@dataclass(frozen=True)
class Roofline:
    """GFLOP/s by dtype and GB/s, reads and writes both counted."""

    gflops: dict[str, float]
    gbytes: float

    def floor_ms(self, cost: Cost, dtype: str) -> float:
        """The least time that a cost takes here."""
        return max(cost.flops / self._top(dtype), cost.bytes / self.gbytes) / 1e6

    def bound(self, cost: Cost, dtype: str) -> str:
        """What sets the floor: "math" or "memory"."""
        return "math" if cost.flops / self._top(dtype) >= cost.bytes / self.gbytes else "memory"

    def or_better(self, other: Roofline) -> Roofline:
        """The best of two moments: a ceiling is no ceiling if the machine was busy just then."""
        gflops = {dtype: max(top, other.gflops[dtype]) for dtype, top in self.gflops.items()}
        return Roofline(gflops, max(self.gbytes, other.gbytes))

    def _top(self, dtype: str) -> float:
        # A processor without 16-bit products multiplies 16-bit matrices slower than float32, which kernels may use.
        return max(self.gflops[dtype], self.gflops.get("float32", 0.0))


def measure(timer: Timer, device: str, dtypes: set[str]) -> Roofline:
    """The best of `SAMPLES` each."""
    found = {dtype: _products(timer, device, getattr(torch, dtype)) for dtype in sorted(dtypes | {"float32"})}
    source = torch.randn(COPIED[device] // 4, device=device)
    target = torch.empty_like(source)
    run = timer.prepared(lambda: target.copy_(source))
    return Roofline(found, 2 * COPIED[device] / _best_ms(timer, run) / 1e6)


def _products(timer: Timer, device: str, dtype: torch.dtype) -> float:
    """GFLOP/s of the best size."""
    last = SIDE[device]
    side = FIRST_SIDE if device == "cpu" and dtype.itemsize == 2 else last
    best = ms = 0.0
    while side <= last and ms < SLOW_MS:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        ms = _best_ms(timer, timer.prepared(functools.partial(torch.mm, a, b, out=out)))
        best, side = max(best, 2 * side**3 / ms / 1e6), 2 * side
    return best


def _best_ms(timer: Timer, run: Run) -> float:
    return min(timer.sample(run) for _ in range(SAMPLES))
