"""Where the time of some calls goes: a trace of torch.profiler, its kernels, and what attention has of it.

Every pass of ours runs inside a range that is named by its spec: `record_function` for torch.profiler, NVTX for nsys
and ncu. Time belongs to attention where such a range, or PyTorch's own attention, is among the callers of an operation.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from attn.backends import BACKENDS, load
from attn.benchmarks.timer import Run
from attn.operands import spec_of
from attn.packed import decode_spec
from attn.spec import DecodeOperands, Operands

RANGE, STEP = "attn ", "step of the profile"
PASSES = ("forward", "infer", "forward_weights", "backward", "decode", "call")
ATTENTION = ("scaled_dot_product", "_efficient_attention", "_flash_attention", "_softmax", "native_multi_head")
PROJECTIONS = ("aten::linear", "aten::addmm", "aten::mm", "aten::matmul", "AddmmBackward", "MmBackward")
SHARES = ("attention", "projections and other matrix products", "the rest")


@dataclass
class Profile:
    """What a trace shows. Times in ms for each step; `device` is whether they are those of a GPU."""

    device: bool
    steps: int
    wall: float
    kernels: list[tuple[str, float, int]]
    """(name, ms, calls) of the kernels of a GPU or the operations of a CPU, by time of their own, the largest first."""
    shares: dict[str, float]
    ranges: list[tuple[str, float, int]]
    """The same of our ranges, with what runs inside."""
    idle: float = 0.0
    """ms in which a GPU waits between the first kernel and the last: launch gaps."""
    names: list[str] = field(default_factory=list)
    """Kernels of a GPU in our ranges: what ncu is to look at."""


def run(step: Run, steps: int, trace: Path | None) -> Profile:
    """Profile `step` after one call of it, and write the trace for Chrome or Perfetto."""
    gpu = torch.cuda.is_available()
    step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with ranges(), profile(activities=activities) as seen:
        for _ in range(steps):
            with record_function(STEP):
                step()
                if gpu:
                    torch.cuda.synchronize()
    if trace is not None:
        seen.export_chrome_trace(str(trace))
    return summary(list(seen.events() or []), steps)


def counted(step: Run) -> int | None:
    """The operations of one call as torch's FlopCounterMode sees them; None where it cannot follow."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    try:
        with counter:
            step()
    except RuntimeError:  # it refuses torch.autograd.grad inside modules
        return None
    return int(counter.get_total_flops())


@contextlib.contextmanager
def ranges() -> Iterator[None]:
    """Inside, every pass of every backend that works here is a range named by its spec."""
    engines = [load(name) for name in BACKENDS if load(name).missing is None]
    for engine in engines:
        for name in PASSES:
            setattr(engine, name, _ranged(getattr(engine, name), engine.name, name))
    try:
        yield
    finally:
        for engine in engines:
            for name in PASSES:
                delattr(engine, name)


def _ranged(method: Callable[..., Any], backend: str, name: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def inside(*args: Any) -> Any:
        label = range_name(backend, name, args[-1] if name == "call" else args[0])
        with record_function(label), _nvtx(label):
            return method(*args)

    return inside


def range_name(backend: str, name: str, x: Operands | DecodeOperands) -> str:
    """The name of a range: backend, pass, and the spec with the sizes."""
    spec = decode_spec(x) if isinstance(x, DecodeOperands) else spec_of(x)
    sizes = " x ".join(str(tuple(t.shape)) for t in x[:2])
    return f"{RANGE}{backend} {name}: {spec} | {sizes}"


@contextlib.contextmanager
def _nvtx(label: str) -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.nvtx.range_push(label)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


def summary(events: Sequence[Any], steps: int) -> Profile:
    """Sort out the events of a trace."""
    events = [e for e in events if not (_on_gpu(e) and e.is_user_annotation)]  # ranges, drawn once more on the GPU
    gpu = any(_on_gpu(e) for e in events)
    marks = [e for e in events if e.name == STEP and not _on_gpu(e)]
    wall = sum(e.time_range.elapsed_us() for e in marks)
    shares = dict.fromkeys(SHARES, 0.0)
    kernels: dict[str, tuple[float, int]] = {}
    inside: dict[str, tuple[float, int]] = {}
    for e in events:
        if _on_gpu(e):
            _add(kernels, e.name, e.time_range.elapsed_us())
            continue
        if e.name == STEP:
            continue
        if e.name.startswith(RANGE):
            _add(inside, e.name, e.device_time_total if gpu else e.cpu_time_total)
        own = e.self_device_time_total if gpu else e.self_cpu_time_total
        shares[_share(e)] += own
        if not gpu and not e.name.startswith(RANGE):
            _add(kernels, e.name, own)
    per_step = 1e3 * steps
    return Profile(
        gpu,
        steps,
        wall / per_step,
        _sorted(kernels, per_step, steps),
        {name: us / per_step for name, us in shares.items()},
        _sorted(inside, per_step, steps),
        _idle([e for e in events if _on_gpu(e)]) / per_step,
        sorted({k.name for e in events if not _on_gpu(e) and _share(e) == SHARES[0] for k in e.kernels}),
    )


def _share(e: Any) -> str:
    """To whom the time of an event belongs: its callers decide, the outermost attention first."""
    chain = []
    while e is not None:
        chain.append(e.name)
        e = e.cpu_parent
    if any(name.startswith(RANGE) or any(word in name for word in ATTENTION) for name in chain):
        return SHARES[0]
    return SHARES[1] if any(name.startswith(PROJECTIONS) for name in chain) else SHARES[2]


def _on_gpu(e: Any) -> bool:
    return bool(e.device_type == torch.autograd.DeviceType.CUDA)


def _add(found: dict[str, tuple[float, int]], name: str, us: float) -> None:
    total, calls = found.get(name, (0.0, 0))
    found[name] = (total + us, calls + 1)


def _sorted(found: dict[str, tuple[float, int]], per_step: float, steps: int) -> list[tuple[str, float, int]]:
    rows = [(name, us / per_step, -(-calls // steps)) for name, (us, calls) in found.items()]
    return sorted(rows, key=lambda row: -row[1])


def _idle(kernels: Sequence[Any]) -> float:
    """Microseconds without any kernel, from the first to the last."""
    spans = sorted((k.time_range.start, k.time_range.end) for k in kernels)
    idle, busy_until = 0.0, spans[0][0] if spans else 0.0
    for start, end in spans:
        idle += max(0.0, start - busy_until)
        busy_until = max(busy_until, end)
    return idle
