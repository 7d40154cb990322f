"""A timer that runs what it is given and makes the times up, so that tests of benchmarks measure nothing."""

from __future__ import annotations

import random
from collections.abc import Callable

from attn.testing import spy

Run = Callable[[], object]


class FakeTimer:
    """10 ms for whatever runs, times `slow` where one of our kernels ran, with noise and `weather` for all alike."""

    def __init__(self, slow: float = 1.0, noise: float = 0.0, weather: float = 1.0, seed: int = 0) -> None:
        self.slow, self.noise, self.weather = slow, noise, weather
        self.random = random.Random(seed)
        self.clock, self.sampled = 0.0, 0

    def now(self) -> float:
        return self.clock

    def prepared(self, run: Run) -> Run:
        run()
        return run

    def sample(self, run: Run) -> float:
        with spy() as calls:
            run()
        ms = 10.0 * self.weather * self.random.lognormvariate(0.0, self.noise) * (self.slow if calls else 1.0)
        self.clock += ms / 1e3
        self.sampled += 1
        return ms

    def memory(self, run: Run) -> int | None:
        return 1 << 20
