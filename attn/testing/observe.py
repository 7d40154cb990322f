"""Watching a call: which backend ran, and whether memory was written that should not be, or not written that should."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attn import native
from attn.backends import base


@contextlib.contextmanager
def spy() -> Iterator[list[tuple[str, str]]]:
    """The passes that run inside the block, in order, as (backend, "forward" | "backward" | "decode" | "call").

    >>> with spy() as calls:
    ...     pass
    >>> calls
    []
    """
    calls: list[tuple[str, str]] = []
    base.observers.append(calls)
    try:
        yield calls
    finally:
        base.observers[:] = [seen for seen in base.observers if seen is not calls]


class PoisonedEmpty(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the block every uninitialised tensor starts as NaN (integers: their largest number).

    What a kernel forgets to write then shows, instead of being whatever the allocator had there.
    """

    def __enter__(self) -> PoisonedEmpty:
        native.poison(True)  # compiled kernels get their outputs without asking the dispatcher
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        native.poison(False)

    EMPTY = ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func._schema.name in self.EMPTY and isinstance(made, Tensor):
            if made.is_floating_point():
                made.fill_(torch.nan)
            elif made.dtype != torch.bool:
                made.fill_(torch.iinfo(made.dtype).max)
        return made


class Guarded:
    """Copies of tensors inside larger buffers, whose rims `assert_intact` looks at afterwards.

    >>> guard = Guarded()
    >>> t = guard.copy(torch.ones(2, 3))
    >>> t.mul_(2).sum()
    tensor(12.)
    >>> guard.assert_intact()
    """

    RIM = 256
    CANARY = 0x5A

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []

    def copy(self, t: Tensor) -> Tensor:
        """A tensor with t's values and strides, between two rims of canary bytes."""
        span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        size = span * t.element_size()
        buffer = torch.full((2 * self.RIM + size,), self.CANARY, dtype=torch.uint8, device=t.device)
        inner = buffer[self.RIM : self.RIM + size].view(t.dtype)
        self.buffers.append((buffer, size))
        copied = inner.as_strided(t.shape, t.stride(), inner.storage_offset())
        if any(s == 0 and n > 1 for n, s in zip(t.shape, t.stride(), strict=True)):  # stride 0: write once
            index = tuple(slice(0, 1) if s == 0 else slice(None) for s in t.stride())
            copied[index].copy_(t[index])
            return copied
        return copied.copy_(t)

    def assert_intact(self) -> None:
        """Raise AssertionError where a rim was written."""
        for n, (buffer, size) in enumerate(self.buffers):
            for side, rim in (("before", buffer[: self.RIM]), ("after", buffer[self.RIM + size :])):
                if bool((rim != self.CANARY).any()):
                    raise AssertionError(f"guard region {side} buffer {n} ({size} bytes) was written")
