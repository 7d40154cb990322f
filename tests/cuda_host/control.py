"""The emulator inside an emulated library: how it delivers copies and schedules warps, and what it has counted."""

from __future__ import annotations

import ctypes
from pathlib import Path

LATE, EARLY, RANDOM = range(3)
"""When an asynchronous copy arrives: at the wait for it, at once, or at one of both."""


class Emulator:
    """That of the library at `path`, which is loaded if it is not yet."""

    def __init__(self, path: str | Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.attn_emu_set.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_uint32]
        for name in ("launches", "products", "bank_conflicts"):
            getattr(self._library, f"attn_emu_{name}").restype = ctypes.c_uint64

    def set(self, arrival: int = LATE, seed: int = 0, checks: bool = True, shift: int = 0) -> None:
        """`seed`: 0 runs warps in order, others in a random one; `shift` moves shared memory by so many bytes, a
        multiple of 128. Without `checks` races and reads of what nobody wrote are not looked for."""
        self._library.attn_emu_set(arrival, seed, int(checks), shift)

    def vary(self, turn: int) -> None:
        """The settings of the n-th of many cases: together they see every arrival, some orders and shifts."""
        self.set(turn % 3, turn % 4, True, turn % 5 * 128)

    @property
    def launches(self) -> int:
        """Kernels launched so far."""
        return int(self._library.attn_emu_launches())

    @property
    def products(self) -> int:
        """Tensor core instructions so far, one per warp."""
        return int(self._library.attn_emu_products())

    @property
    def bank_conflicts(self) -> int:
        """Passes of ldmatrix so far that its rows' banks made necessary beyond the four it needs."""
        return int(self._library.attn_emu_bank_conflicts())
