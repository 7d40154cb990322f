"""The timings of the GPU suite: the works of every preset by the harness of `bench`, all contenders in one race.

Works of all presets alternate, so that each has been begun where the time ends before the works do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from attn.benchmarks import harness, presets, report, roofline
from attn.benchmarks.harness import Lineup, Who
from attn.benchmarks.peers import PEERS, Contender
from attn.benchmarks.timer import timer_for
from attn.benchmarks.work import Work

SECONDS_OF_WORK = 0.3
"""For the rounds of one work."""
LENGTHS = (4096, 1024, 16384, 2048, 8192, 512)
"""Of the published sweep, the most telling first."""
SMALL = {"B": 1, "H": 1, "D": 16, "layers": 1}


@dataclass
class Timings:
    """Results as `bench --json` holds them, each with its preset, and the lines of works that no time was left for."""

    roofline: dict[str, Any]
    results: list[dict[str, Any]]
    left_out: list[str]


def timings(backends: tuple[str, ...], device: str, small: bool, until: float) -> Timings:
    """Every work of every preset, until the clock says so. A work that cannot be set up is a result too."""
    clock = timer_for(device)
    if small:
        clock.flushed = clock.flushed[:1]  # to empty caches would take longer than all the rest
    planned = list(works(device, small))
    roof = roofline.measure(clock, device, {w.dtype for _, w in planned})
    found = Timings({"gflops": roof.gflops, "gbytes": roof.gbytes}, [], [])
    for preset, work in planned:
        if time.monotonic() > until:
            found.left_out.append(str(work))
            continue
        try:
            result = measure(work, Who(backends, peers_of(preset, work)), clock, 0.0 if small else SECONDS_OF_WORK)
            plain = report.plain(result, roof)
        except Exception as error:  # out of memory, say: the others go on
            plain = report.plain(harness.Result(work, 0, 1, [], {"everyone": f"{type(error).__name__}: {error}"}), roof)
        found.results.append(plain | {"preset": preset})
    return found


def works(device: str, small: bool) -> Iterator[tuple[str, Work]]:
    """(preset, work) in turns; in small, one of each kind and pass of `quick`, and the first of the others."""
    by_preset = {name: list(make(device)) for name, make in presets.PRESETS.items()}
    by_preset["paper"].sort(key=lambda w: LENGTHS.index(w.L))
    if small:
        by_preset = {name: _small(found, 99 if name == "quick" else 1) for name, found in by_preset.items()}
    for turn in itertools.zip_longest(*by_preset.values()):
        for preset, work in zip(by_preset, turn, strict=True):
            if work is not None:
                yield preset, work


def _small(found: list[Work], most: int) -> list[Work]:
    first = {(w.kind, w.what): w for w in reversed(found)}
    lengths = {w: {"L": min(w.L, 16), "S": 16 if w.S else 0, "Hkv": 0} for w in first.values()}
    made = [dataclasses.replace(w, dtype="float32", **SMALL, **lengths[w]) for w in first.values()]
    return list(reversed(made))[:most]


def peers_of(preset: str, work: Work) -> tuple[str, ...]:
    """Those whose time is worth it: at 16k tokens `sdpa math` would take most of it, and FlexAttention compiles."""
    flex = (work.L, work.D) == (4096, 128) if preset == "paper" else work.mask in ("window", "documents")
    left_out = {"flex": not flex, "sdpa math": preset == "paper"}
    return tuple(name for name in PEERS if not left_out.get(name, False))


def measure(work: Work, who: Who, clock: Any, seconds: float) -> harness.Result:
    """As `harness.measure`, with the variants of some contenders in the same race."""
    ready = harness.lineup(work, who)
    found = [*ready.contenders, *variants(work, ready)]
    rows = harness.race(found, ready.runs, ready.check, clock, seconds)
    return harness.Result(work, ready.cost.flops, ready.cost.bytes, rows, ready.absent)


def variants(work: Work, ready: Lineup) -> list[Contender]:
    """Of a backward pass on a GPU: deterministic, and Triton's in one pass, which is opt-in until timings choose."""
    if work.kind != "attention" or work.what != "backward" or work.device != "cuda":
        return []
    made = []
    for c in ready.contenders:
        if c.ours or c.name == "sdpa flash":
            made.append(_variant(ready, c, "deterministic", deterministic))
        if c.name == "attn triton" and work.D <= 64:
            made.append(_variant(ready, c, "one pass", one_pass))
    return made


def _variant(
    ready: Lineup, c: Contender, word: str, how: Callable[[], contextlib.AbstractContextManager[Any]]
) -> Contender:
    @contextlib.contextmanager
    def inside() -> Iterator[None]:
        with c.inside(), how():
            yield

    name = f"{c.name}, {word}"
    ready.runs[name] = ready.runs[c.name]
    return dataclasses.replace(c, name=name, inside=inside)


@contextlib.contextmanager
def one_pass() -> Iterator[None]:
    """Triton's backward in a single pass."""
    from attn.triton_kernels import config

    before, config.ONE_PASS = config.ONE_PASS, True
    try:
        yield
    finally:
        config.ONE_PASS = before


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """torch's deterministic algorithms, with a warning where there is none."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
