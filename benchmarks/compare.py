"""A run against an earlier one: what became slower beyond noise.

Two runs meet different weather, so what is compared is the time of ours over that of its peers in the same round (their
geometric mean, over the peers that both runs have), by the median over the rounds. It counts where it grew by more than
`LEAST`, and by more than `SIGMAS` of its standard error. Where there is no peer, the times themselves are compared.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from attn.benchmarks.harness import Result
from attn.benchmarks.machine import SAME

LEAST, LEAST_ALONE = 1.25, 1.4
SIGMAS = 4.0
ERROR_OF_MEDIAN = 1.4826 * 1.2533
"""From the median absolute deviation over the root of the number of samples to the standard error of the median."""


@dataclass(frozen=True)
class Change:
    """How a contender of ours stands against its earlier self: `ratio` > 1 is slower."""

    work: str
    contender: str
    ratio: float
    allowed: float
    words: str = ""

    @property
    def slower(self) -> bool:
        """Whether it became slower beyond noise, or lost its time altogether."""
        return self.ratio > self.allowed

    @property
    def quicker(self) -> bool:
        """Whether it became quicker beyond noise."""
        return self.ratio < 1 / self.allowed


def other_machine(now: dict[str, Any], before: dict[str, Any]) -> str:
    """What differs between two machines so that their times cannot be compared; empty if nothing does."""
    differing = [n for n in SAME if now.get(n) != before.get(n)]
    return ", ".join(f"{n} {before.get(n)} then, {now.get(n)} now" for n in differing)


def changes(result: Result, before: dict[str, Any] | None) -> list[Change]:
    """One for each contender of ours that had a time then; `before` is the result of that work in the earlier JSON."""
    if before is None:
        return []
    work = str(result.work)
    rows = {r.contender: r for r in result.rows}
    then = {r["contender"]: r["ms"] for r in before["rows"] if r["ms"]}
    peers = [n for n, r in rows.items() if not r.ours and r.ms and n in then]
    found = []
    for name, old in then.items():
        row = rows.get(name)
        if row is None or not row.ours:
            continue
        if not row.ms:
            found.append(Change(work, name, math.inf, 1.0, row.problem.splitlines()[0] if row.problem else "no time"))
            continue
        a, error_a = _against(old, [then[n] for n in peers])
        b, error_b = _against(row.ms, [rows[n].ms for n in peers])
        least = LEAST if peers else LEAST_ALONE
        allowed = math.exp(max(math.log(least), SIGMAS * math.hypot(error_a, error_b)))
        found.append(Change(work, name, math.exp(b - a), allowed))
    return found


def _against(ms: list[float], peers: list[list[float]]) -> tuple[float, float]:
    """The median over rounds of the logarithm of a time over the peers' mean, and its standard error."""
    rounds = []
    for n, own in enumerate(ms):
        others = [math.log(p[n]) for p in peers if n < len(p)]
        rounds.append(math.log(own) - (statistics.mean(others) if others else 0.0))
    middle = statistics.median(rounds)
    deviation = statistics.median(abs(r - middle) for r in rounds)
    return middle, ERROR_OF_MEDIAN * deviation / math.sqrt(len(rounds))
