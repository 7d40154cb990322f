"""A progress bar on a terminal; a line now and then where the output goes to a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(title: str, steps: int) -> Iterator[Callable[[str], None]]:
    """Yields what is to be called after each step, with a few words on how it stands. Everything goes to stderr."""
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import Progress
        except ModuleNotFoundError:
            pass  # the `bench` extra is not installed: plain lines do
        else:
            with Progress(console=Console(stderr=True), transient=True) as bar:
                row = bar.add_task(title, total=steps)
                yield lambda words: bar.update(row, advance=1, description=f"{title}: {words}")
            return
    yield _Lines(title, steps).advance


class _Lines:
    def __init__(self, title: str, steps: int) -> None:
        self.title, self.steps, self.done = title, steps, 0
        self.start = self.last = time.monotonic()

    def advance(self, words: str) -> None:
        self.done += 1
        if time.monotonic() - self.last >= SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            left = (self.last - self.start) / self.done * (self.steps - self.done)
            where = f"step {self.done} of {self.steps}, about {left:.0f} s left"
            print(f"{self.title}: {where}, {words}", file=sys.stderr, flush=True)
