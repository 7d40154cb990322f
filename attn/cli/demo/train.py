"""Two trainings from one seed, step by step in turn, so that both meet the same machine."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import attn
from attn.cli.demo.models import SEED, Size, Task
from attn.cli.progress import progress
from attn.testing import spy

WARM_UP = 3
"""Steps at the start that are not timed."""
FEWEST = 8
"""Steps that are made however long they take."""
FIRST, RUN = 1e-5, 1e-3
"""Largest relative difference of the losses at the first step, and over the run (float32)."""


@dataclass
class Training:
    """One of the two."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: torch.Generator
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def ms(self) -> float:
        """Median time of a step."""
        return 1e3 * statistics.median(self.seconds[WARM_UP:])


@dataclass
class Pair:
    """Both, and which backends ran ours: (backend, pass) -> calls in one step."""

    task: Task
    stock: Training
    ours: Training
    ran: Counter[tuple[str, str]]

    @property
    def differences(self) -> list[float]:
        """Relative difference of the losses at each step."""
        return [abs(b - a) / abs(a) for a, b in zip(self.stock.losses, self.ours.losses, strict=True)]

    @property
    def agrees(self) -> bool:
        """Whether both trainings are the same, as far as float32 can tell; a NaN is no agreement."""
        return self.differences[0] <= FIRST and all(d <= RUN for d in self.differences)


def both_ways(task: Task, size: Size) -> Pair:
    """Trains the task's model as it is and replaced, until the steps are made or the time is over."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stock, ours = (_training(task.model().to(device)) for _ in range(2))
    attn.replace(ours.model)
    ran: Counter[tuple[str, str]] = Counter()
    deadline = time.monotonic() + size.seconds
    with progress(task.name, size.steps) as advance:
        for step in range(size.steps):
            if step >= FEWEST and time.monotonic() > deadline:
                break
            for training in (stock, ours) if step % 2 else (ours, stock):
                if step == WARM_UP - 1:
                    training.peak_bytes = _peak_bytes(task, training, device)
                elif step == 0 and training is ours:
                    with spy() as calls:
                        _step(task, training, device)
                    ran.update((backend, what) for backend, what in calls)
                else:
                    _step(task, training, device)
            advance(f"loss {ours.losses[-1]:.3f}")
    return Pair(task, stock, ours, ran)


def _training(model: nn.Module) -> Training:
    return Training(model, torch.optim.AdamW(model.parameters(), 1e-3), torch.Generator().manual_seed(SEED))


def _step(task: Task, training: Training, device: torch.device) -> None:
    """One batch, one update; its loss and its time are kept."""
    _wait(device)
    start = time.perf_counter()
    training.optimizer.zero_grad()
    loss = task.loss(training.model, training.batches, device)
    loss.backward()  # type: ignore[no-untyped-call]
    training.optimizer.step()
    _wait(device)
    training.seconds.append(time.perf_counter() - start)
    training.losses.append(loss.item())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(task: Task, training: Training, device: torch.device) -> int | None:
    """Memory that one step takes beyond what lay there before it: parameters, their moments and the data."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _step(task, training, device)
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        _step(task, training, device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return _highest([e for e in events if e.get("name") == "[memory]"])


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's C++ side notes its start and stop on stderr, whatever its log level."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _highest(events: list[dict[str, Any]]) -> int | None:
    """The highest sum of the allocations so far; None where the profiler saw none."""
    now = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak or None
