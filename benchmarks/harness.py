"""A work's contenders are checked, then timed in turns, in one run; a run visits each of its works several times.

Whoever fails its check, or raises, gets no time. The others are warmed up until their times settle; then all take
turns, the order changing from round to round, so that heat, clocks and other work on the machine meet all alike.
What else shares caches and cores changes from second to second and does not slow all down alike, so the rounds of a
work are spread over the whole run.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attn.benchmarks import checks, modules, problem
from attn.benchmarks.peers import Contender, contenders
from attn.benchmarks.timer import Run, Timer
from attn.benchmarks.work import CALLS, Cost, Work, cost_of_call, cost_of_module
from attn.spec import DecodeOperands

SETTLED, WARM_UPS = 0.1, 5
"""Two samples in a row that differ by no more than this part end the warm-up; at the latest, so many do."""
ROUNDS = (7, 40)
"""At least, whatever it takes, and at most, whatever time is left."""
VISITS, ROUNDS_OF_VISIT = 6, (2, 10)
"""How often a run comes back to a work, and the same of each time."""

Check = Callable[[Contender], float]
"""The largest error over what is allowed; AssertionError where more is wrong."""


@dataclass
class Row:
    """What became of one contender: a sample per round in ms, or why there is none."""

    contender: str
    ours: bool
    ms: list[float] = field(default_factory=list)
    error: float = math.nan
    """The largest error over what is allowed."""
    problem: str = ""
    wrong: bool = False
    memory: int | None = None

    def percentile(self, p: float) -> float:
        """ms, interpolated; NaN without samples."""
        if not self.ms:
            return math.nan
        ordered = sorted(self.ms)
        at = p / 100 * (len(ordered) - 1)
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])

    @property
    def median(self) -> float:
        """ms."""
        return self.percentile(50)


@dataclass
class Result:
    """A work with its rows, and the peers that took no part. `cost` is the least that has to be done."""

    work: Work
    flops: int
    bytes: int
    rows: list[Row]
    absent: dict[str, str]

    @property
    def best(self) -> Row | None:
        """The quickest."""
        return min((r for r in self.rows if r.ms), key=lambda r: r.median, default=None)


@dataclass(frozen=True)
class Who:
    """Whom to time: names of our backends and of peers; empty for all."""

    backends: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()


EVERYONE = Who()


@dataclass
class Lineup:
    """A work, ready: who takes part, how each is checked and what of it is sampled, and who is absent and why."""

    contenders: list[Contender]
    runs: dict[str, Callable[[], Run]]
    check: Check
    cost: Cost
    absent: dict[str, str]


def lineup(work: Work, who: Who = EVERYONE) -> Lineup:
    """Data, contenders and exact results of a work."""
    if work.kind not in CALLS:
        m = modules.problem(work)
        found, wanted = m.contenders(who.backends), functools.cache(lambda: modules.ModuleExpected(m))
        of = {c.name: m.ours if c.ours else m.stock for c in found}
        runs = {c.name: _run(work, c.call, m.leaves(of[c.name]), m.d_out) for c in found}
        return Lineup(found, runs, lambda c: wanted().worst(of[c.name]), cost_of_module(work), {})
    case, x = work.case, work.operands()
    p = problem.problem(case, x)
    found, absent = contenders(p, who.backends, who.peers)
    expected = functools.cache(lambda: checks.expected(case, x))
    d_out = None if isinstance(x, DecodeOperands) or not case.has_gradients else case.gradients(x)[0]
    runs = {c.name: _run(work, c.call, p.leaves, d_out) for c in found}
    return Lineup(found, runs, lambda c: _worst_of_call(c, p, expected()), cost_of_call(work, x), absent)


def measure(works: Sequence[Work], timer: Timer, seconds: float, who: Who = EVERYONE) -> list[Result]:
    """Check and time everyone; `seconds` is for the rounds of a work alone."""
    *_, found = visits(works, timer, seconds, who)
    return found


def visits(
    works: Sequence[Work],
    timer: Timer,
    seconds: float,
    who: Who = EVERYONE,
    advance: Callable[[str], None] = lambda _: None,
) -> Iterator[list[Result]]:
    """What is known after each visit to all works, the last being `measure`'s; `advance` is called after each work."""
    found: dict[Work, Result] = {}
    for _ in range(VISITS):
        for work in works:
            found[work] = _visit(work, timer, seconds / VISITS, who, found[work].rows if work in found else ())
            advance(str(work))
        yield [found[work] for work in works]


def _visit(work: Work, timer: Timer, seconds: float, who: Who, known: Sequence[Row]) -> Result:
    ready = lineup(work, who)  # made anew, and gone afterwards: the data of all works together might not fit
    rows = race(ready.contenders, ready.runs, ready.check, timer, seconds, ROUNDS_OF_VISIT, known)
    return Result(work, ready.cost.flops, ready.cost.bytes, rows, ready.absent)


def race(
    found: Sequence[Contender],
    runs: dict[str, Callable[[], Run]],
    check: Check,
    timer: Timer,
    seconds: float,
    rounds: tuple[int, int] = ROUNDS,
    known: Sequence[Row] = (),
) -> list[Row]:
    """Rows in the order of the contenders. `runs` makes what is sampled of each, once its check has passed.

    Rows that are `known` from an earlier visit go on: nobody is checked twice, and who got no time gets none.
    """
    rows = {r.contender: r for r in known or [Row(c.name, c.ours) for c in found]}
    ready: dict[str, Run] = {}
    for c in found:
        row = rows[c.name]
        if row.problem:
            continue
        try:
            with c.inside(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch warns of each kernel that it may not use
                if not known:
                    row.error = check(c)
                run = runs[c.name]()
                ready[c.name] = timer.prepared(run)
                if not known:
                    row.memory = timer.memory(run)
                _warm_up(timer, ready[c.name], 1 if known else WARM_UPS)
        except Exception as error:  # a kernel that refuses a shape is an answer too, and the others go on
            row.wrong = isinstance(error, AssertionError) and not known
            row.problem = str(error) if row.wrong else " ".join(f"{type(error).__name__}: {error}".split())[:300]
            row.ms.clear()
    alive = [c for c in found if not rows[c.name].problem]
    start, n = timer.now(), 0
    while alive and n < rounds[1] and (n < rounds[0] or timer.now() - start < seconds):
        first = len(rows[alive[0].name].ms) % len(alive)
        for c in [*alive[first:], *alive[:first]]:
            with c.inside():
                rows[c.name].ms.append(timer.sample(ready[c.name]))
        n += 1
    return list(rows.values())


def _warm_up(timer: Timer, run: Run, most: int) -> None:
    before = 0.0
    for _ in range(most):
        now = timer.sample(run)
        if abs(now - before) <= SETTLED * before:
            return
        before = now


def _run(work: Work, call: Callable[[], Tensor], leaves: list[Tensor], d_out: Tensor | None) -> Callable[[], Run]:
    """Makes what is sampled: the pass of the work."""

    def forward() -> Any:
        with torch.no_grad():
            return call()

    def both() -> Any:
        return torch.autograd.grad(call(), leaves, d_out)

    def backward() -> Run:
        out: list[Tensor] = []

        def run() -> Any:
            if not out:  # the first, untimed call: on a GPU its stream is that of the capture
                out.append(call())
            return torch.autograd.grad(out[0], leaves, d_out, retain_graph=True)

        return run

    return backward if work.what == "backward" else lambda: forward if work.what == "forward" else both


def _worst_of_call(c: Contender, p: problem.Problem, expected: checks.Expected) -> float:
    if expected.d_out is None:
        with torch.no_grad():
            return expected.worst(c.call(), ())
    out = c.call()
    return expected.worst(out.detach(), torch.autograd.grad(out, p.leaves, expected.d_out))
