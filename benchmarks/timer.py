"""How a run is timed, and what memory it needs, on a CPU and on a GPU. Caches are emptied before every sample.

On a GPU a run is captured in a CUDA graph and its replays are timed by events, so that no launch from Python is
counted; what cannot be captured is timed by events around the call. The GPU timer was not run on hardware yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

Run = Callable[[], object]
LAST_LEVEL = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
FLUSHED_WITHOUT_ANSWER = 32 << 20
SHARED_FROM = 64 << 20
"""Bytes of a last-level cache above which it serves many cores: a part of that size is flushed, or a sample would take
longer to prepare than to time."""
TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""What glibc's mallopt calls M_TRIM_THRESHOLD and M_MMAP_MAX."""
PEAK, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class CpuTimer:
    """Wall-clock time of single calls."""

    def __init__(self) -> None:
        _keep_freed_memory()
        self.flushed = torch.empty(2 * min(_last_level_cache(), SHARED_FROM), dtype=torch.uint8)

    def now(self) -> float:
        """Seconds, for budgets."""
        return time.perf_counter()

    def prepared(self, run: Run) -> Run:
        """What is to be sampled in the place of `run`, after one call of it."""
        run()
        return run

    def sample(self, run: Run) -> float:
        """Milliseconds of one call, from a cold cache."""
        self.flushed.add_(1)
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3

    def memory(self, run: Run) -> int | None:
        """Bytes by which one call raises the high-water mark of this process; None where the system cannot tell."""
        try:
            if sys.platform == "linux":
                ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed, and kept, would be used unseen
            RESET.write_text("5")
            before = _kib("VmRSS")
            run()
            return max(0, _kib("VmHWM") - before) << 10
        except (OSError, ValueError, AttributeError):
            return None


class GpuTimer:
    """Events around replays of a CUDA graph."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        size = 2 * getattr(properties, "L2_cache_size", FLUSHED_WITHOUT_ANSWER)
        self.flushed = torch.empty(size, dtype=torch.uint8, device="cuda")
        self.stream = torch.cuda.Stream()

    def now(self) -> float:
        """Seconds, for budgets."""
        torch.cuda.synchronize()
        return time.perf_counter()

    def prepared(self, run: Run) -> Run:
        """A replay of `run`, or `run` itself where it cannot be captured."""
        # Backward runs on the stream of its forward: both have to see the one that is captured.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(3):  # kernels compile and tune themselves before a capture, not in it
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                run()
        except RuntimeError:
            torch.cuda.synchronize()
            return lambda: self._on_stream(run)
        return graph.replay

    def sample(self, run: Run) -> float:
        """Milliseconds of one call, from a cold L2 cache."""
        self.flushed.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def memory(self, run: Run) -> int | None:
        """Bytes by which one call raises the high-water mark of torch's allocator."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _on_stream(self, run: Run) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            run()
        torch.cuda.current_stream().wait_stream(self.stream)


Timer = CpuTimer | GpuTimer


def _keep_freed_memory() -> None:
    """From now on malloc keeps what is freed, for the next call to use again: ours and the peers' alike.

    Left alone, glibc gives large blocks back to the system, or finds room for them in its heap, as that happens to lie.
    The same call of PyTorch's math kernel then met 16386 page faults, 8193 or none, by process, and took up to 1.6
    times as long; a module that returns weights met 8160 or none.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another library than glibc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(MMAP_MAX, 0)
            mallopt(TRIM_THRESHOLD, -1)


def timer_for(device: str) -> Timer:
    """The timer of that device type."""
    return GpuTimer() if device == "cuda" else CpuTimer()


def _last_level_cache() -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(LAST_LEVEL.read_text().strip().removesuffix("K")) << 10
    return FLUSHED_WITHOUT_ANSWER


def _kib(name: str) -> int:
    for line in PEAK.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise ValueError(f"{PEAK} has no {name}")
