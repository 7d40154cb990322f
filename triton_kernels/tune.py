"""ATTN_AUTOTUNE=1: time the neighbours of each tile of the table once per kind of call, and remember the quickest.

The results lie in `triton-tiles.json` in the user's cache folder, which only the user can read or write. Nothing is
timed unless asked for: a first call never waits for a search.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable

import torch

from attn import user_cache

from . import config
from .arguments import Tiles, plans

ROUNDS = 5
FILE = "triton-tiles.json"
_state: dict[str, bool] = {"loaded": False, "busy": False}


def wanted() -> bool:
    """Whether the environment asks for it."""
    return os.environ.get("ATTN_AUTOTUNE", "0") not in ("", "0")


def tune(tiles: Tiles, names: Iterable[str], run: Callable[[], object]) -> None:
    """Find the quickest tile of each named pass by timing `run`, a whole call that uses it. Known ones stay."""
    if _state["busy"]:
        return
    if not _state["loaded"]:
        config.TUNED.update(_read())
        _state["loaded"] = True
    keys = {name: config.tuned_key(tiles.arch, name, tiles.dim, tiles.math, tiles.load) for name in names}
    missing = {name: key for name, key in keys.items() if key not in config.TUNED}
    if not missing:
        return
    _state["busy"] = True
    try:
        for name, key in missing.items():
            start = config.tile(tiles.arch, name, tiles.dim, tiles.math, tiles.load)
            timed = [(_seconds(key, t, run, tiles.device), t) for t in neighbours(start)]
            config.TUNED[key] = min(timed)[1]
    finally:
        _state["busy"] = False
        plans.clear()
    _write()


def neighbours(t: config.Tile) -> list[config.Tile]:
    """The tile, and those that differ from it in one thing."""
    changes = [
        {"rows": t.rows * 2},
        {"rows": t.rows // 2},
        {"keys": t.keys * 2},
        {"keys": t.keys // 2},
        {"warps": 12 - t.warps},
        {"stages": 3 - t.stages},
        {"stages": t.stages + 1},
        {"registers": 0 if t.registers else 128},
    ]
    near = [t._replace(**change) for change in changes]
    sizes = [n for n in near if 16 <= n.rows <= 128 and 16 <= n.keys <= 128 and n.warps > 0 and n.stages > 0]
    return [t, *dict.fromkeys(n for n in sizes if n != t)]


def _seconds(key: str, t: config.Tile, run: Callable[[], object], device: torch.device) -> float:
    """The median time of a call with that tile; infinite where it does not compile or does not fit."""
    config.TUNED[key] = t
    plans.clear()

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    try:
        once()
        return statistics.median(once() for _ in range(ROUNDS))
    except Exception:  # whatever Triton raises for a tile that is too large: there is no common class
        return float("inf")


def _read() -> dict[str, config.Tile]:
    try:
        return {key: config.Tile(*map(int, t)) for key, t in user_cache.read(FILE).items()}
    except (ValueError, TypeError):  # not ours
        return {}


def _write() -> None:
    user_cache.write(FILE, {**_read(), **config.TUNED})  # where it cannot be written, that costs time, not results
