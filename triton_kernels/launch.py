"""Launching: a table of compiled kernels in place of Triton's binder, which costs 40 to 50 microseconds a launch."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.runtime import driver

from .tile import place

INTERPRETED = not isinstance(place, triton.runtime.JITFunction)
"""Whether TRITON_INTERPRET=1 was set when the kernels were defined: then they run on CPU tensors, slowly."""
if INTERPRETED:
    from . import interpreter

    interpreter.install()


_observers: list[list[Any]] = []


@contextlib.contextmanager
def observed() -> Iterator[list[Any]]:
    """The entries that are first called inside the block: what a call compiles."""
    seen: list[Any] = []
    _observers.append(seen)
    try:
        yield seen
    finally:
        _observers.remove(seen)


class Entry:
    """One kernel with its compile-time constants. The first call goes through Triton, which compiles or finds the
    compiled kernel; later ones call that directly. So an entry must serve only calls that Triton would specialise
    alike: same dtypes, strides and pointer alignment. `direct=False` always takes Triton's way."""

    __slots__ = ("constants", "direct", "fn", "kernel", "options", "scratch", "values")

    def __init__(self, fn: Any, constants: dict[str, Any], options: dict[str, Any], direct: bool = True) -> None:
        self.fn = fn
        self.constants = constants
        self.values = tuple(constants.values())
        self.options = options
        self.direct = direct and not INTERPRETED
        self.kernel: Any = None
        self.scratch = False

    def __call__(self, grid: int, args: tuple[Any, ...], device: int | None) -> None:
        """Launch `grid` programs on the current stream of the device, which must be the current one."""
        kernel = self.kernel
        if kernel is None:
            self._first(grid, args)
            return
        how = driver.active.get_current_stream(device), kernel.function, kernel.packed_metadata, None, None, None
        if self.scratch:
            _context.run(kernel.run, grid, 1, 1, *how, *args, *self.values)
        else:
            kernel.run(grid, 1, 1, *how, *args, *self.values)

    def _first(self, grid: int, args: tuple[Any, ...]) -> None:
        for seen in _observers:
            seen.append(self)
        run = self.fn[(grid,)]
        if INTERPRETED:
            run(*args, **self.constants, **self.options)
            return
        kernel = _context.run(lambda: run(*args, **self.constants, **self.options))
        if self.direct:
            kernel = kernel.result() if hasattr(kernel, "result") else kernel
            self.scratch = getattr(kernel.metadata, "global_scratch_size", 0) > 0  # on AMD, Triton 3.6 has none
            self.kernel = kernel


class _Context(threading.local):
    """A context with an allocator for the scratch memory of tensor descriptors; the caller's keeps what it has."""

    def __init__(self) -> None:
        self.run = contextvars.copy_context().run
        self.run(triton.set_allocator, _allocate)


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


_context = _Context()
