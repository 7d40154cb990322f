"""`pytest benchmarks --benchmark-only`: the works of the quick preset under pytest-benchmark, checked first."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attn.benchmarks import harness, presets
from attn.benchmarks.peers import ONLY_ON_GPU, PEERS
from attn.benchmarks.work import CALLS, Work

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc: Any) -> None:
    """One benchmark for each work and contender."""
    peers = [name for name in PEERS if DEVICE == "cuda" or name not in (*ONLY_ON_GPU, "flex")]
    pairs = [
        pytest.param(work, name, id=f"{work}-{name}")
        for work in presets.quick(DEVICE)
        for name in ("attn", *(peers if work.kind in CALLS else ("torch",)))
    ]
    metafunc.parametrize(("work", "name"), pairs)


def test_quick(benchmark: Any, work: Work, name: str) -> None:
    """Times one contender of one work; who takes no part is skipped."""
    who = harness.EVERYONE if name in ("attn", "torch") else harness.Who(peers=(name,))
    ready = harness.lineup(work, who)
    wanted = [c for c in ready.contenders if c.ours] if name == "attn" else [c for c in ready.contenders if not c.ours]
    if not wanted:
        pytest.skip(ready.absent.get(name, "nothing to compare with"))
    first = wanted[0]
    with first.inside():
        benchmark.extra_info |= {"contender": first.name, "error": ready.check(first), "flops": ready.cost.flops}
        run = ready.runs[first.name]()
        run()
        benchmark.pedantic(_synchronised(run), rounds=5, warmup_rounds=1)


def _synchronised(run: Any) -> Any:
    if DEVICE == "cpu":
        return run

    def whole() -> None:
        run()
        torch.cuda.synchronize()

    return whole
