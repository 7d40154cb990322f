"""Which tile each kernel runs with: one table, screened by offline compiles (docs/triton.md), not yet on hardware."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
import triton

SHARED = {  # bytes of shared memory that a block may use; Triton itself refuses nothing
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_103": 227 << 10,
    "sm_120": 99 << 10,
    "sm_121": 99 << 10,
    "gfx942": 64 << 10,
}

FAMILY = {
    "sm_80": "sm_80",
    "sm_90": "sm_90",
    "sm_100": "sm_100",
    "sm_103": "sm_100",
    "sm_110": "sm_100",
    "gfx942": "gfx942",
    "": "interpreter",
}
"""Architectures whose rows differ; every other one has the rows of "small": 99 KiB of shared memory, no wgmma."""


class Tile(NamedTuple):
    """Query rows, keys, warps, pipeline stages, register limit (0: none)."""

    rows: int
    keys: int
    warps: int = 4
    stages: int = 2
    registers: int = 0


LIGHT, LENGTHS, HEAVY = 0, 1, 2
"""How much a call asks of the registers. Lengths: no band. Heavy: dense masks, documents, dropout, softcap or ALiBi."""

RECENT = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
"""Triton 3.6 needs more registers for the largest tile."""

# (family, pass) -> {head_dim bucket: tile}, or (light, heavy) or (light, lengths, heavy) tiles; a negative bucket is
# for head dims that are no multiple of 16, whose loads are narrower and take more registers for their addresses.
# Family "ieee" is float32 without tensor cores, alike on every GPU: two stages even where nothing is loaded ahead, as
# ptxas then leaves the rows that a block keeps in shared memory instead of holding all of them in registers.
_TILES: dict[tuple[str, str], dict[int, Tile | tuple[Tile, ...]]] = {
    ("sm_90", "forward"): {
        64: (Tile(128, 128, 8, 2, 128), Tile(128, 64, 8)),
        128: (Tile(128, 64, 8, 2, 128), Tile(128, 64, 8)),
        -128: Tile(128, 64, 8),
        256: Tile(128, 64, 8),
    },
    ("sm_90", "keys"): {
        64: Tile(64, 64, 4),
        128: (Tile(64 if RECENT else 32, 128, 8), Tile(64, 64, 8), Tile(32, 128, 8)),
        -128: Tile(32, 128, 8),
    },
    ("sm_90", "dk"): {256: Tile(32, 128, 8)},
    ("sm_90", "dv"): {256: Tile(64, 128, 8)},
    ("sm_90", "queries"): {64: Tile(128, 64, 8), 128: Tile(128, 64, 8), 256: Tile(128, 32, 8)},
    ("sm_90", "one_pass"): {64: Tile(64, 128, 8)},
    ("sm_100", "forward"): {64: Tile(128, 128, 8), 128: Tile(128, 64, 8), 256: Tile(128, 32, 8)},
    ("sm_100", "keys"): {64: Tile(64, 128, 8), 128: Tile(64, 64, 8)},
    ("sm_100", "dk"): {256: Tile(32, 64, 8)},
    ("sm_100", "dv"): {256: Tile(32, 64, 8)},
    ("sm_100", "queries"): {64: Tile(128, 64, 8), 128: Tile(128, 64, 8, 1), 256: Tile(128, 32, 8)},
    ("sm_80", "forward"): {64: Tile(64, 64, 4), 128: Tile(128, 64, 8), -128: Tile(64, 64, 8), 256: Tile(128, 32, 8)},
    ("sm_80", "keys"): {64: Tile(32, 128, 8), 128: Tile(64, 64, 8), -128: Tile(32, 64, 8)},
    ("sm_80", "dk"): {256: Tile(32, 64, 8)},
    ("sm_80", "dv"): {256: Tile(32, 64, 8)},
    ("sm_80", "queries"): {64: Tile(128, 64, 8), 128: Tile(64, 64, 8), 256: Tile(64, 32, 8, 1)},
    ("small", "forward"): {64: Tile(64, 64, 4), 128: Tile(128, 32, 8), 256: Tile(64, 32, 8, 1)},
    ("small", "keys"): {64: Tile(32, 128, 8), 128: Tile(32, 64, 8)},
    ("small", "dk"): {256: Tile(32, 64, 8, 1)},
    ("small", "dv"): {256: Tile(32, 64, 8)},
    ("small", "queries"): {64: Tile(128, 32, 8), 128: Tile(64, 64, 8), 256: Tile(64, 32, 8, 1)},
    ("ieee", "forward"): {
        64: (Tile(64, 32, 8, 2, 128), Tile(64, 32, 8)),
        128: Tile(32, 32, 8),
        -128: (Tile(32, 16, 8, 2, 128), Tile(32, 16, 8)),
        256: Tile(16, 32, 8, 1),
    },
    ("ieee", "keys"): {64: Tile(32, 32, 8), 128: Tile(16, 16, 8)},
    ("ieee", "dk"): {256: Tile(16, 16, 8)},
    ("ieee", "dv"): {256: Tile(16, 16, 8)},
    ("ieee", "queries"): {
        64: Tile(64, 32, 8),
        128: (Tile(32, 32, 8, 2, 128), Tile(32, 32, 8)),
        -128: (Tile(32, 16, 8, 2, 128), Tile(32, 16, 8)),
        256: Tile(16, 32, 8, 1),
    },
    ("ieee", "delta"): {64: Tile(64, 0, 4, 1, 128), 128: Tile(64, 0, 4, 1), 256: Tile(64, 0, 4, 1)},
    ("gfx942", "forward"): {64: Tile(128, 64, 4), 128: Tile(128, 64, 8), 256: Tile(64, 32, 4)},
    ("gfx942", "keys"): {64: Tile(64, 64, 4), 128: Tile(32, 64, 4)},
    ("gfx942", "dk"): {256: Tile(32, 64, 4)},
    ("gfx942", "dv"): {256: Tile(32, 64, 4)},
    ("gfx942", "queries"): {64: Tile(128, 64, 8), 128: Tile(64, 32, 4), 256: Tile(64, 32, 4)},
}
_COMMON: dict[str, Tile] = {
    "bias": Tile(64, 64, 8, 1),
    "weights": Tile(64, 64, 4, 1),
    "decode": Tile(16, 64, 4, 2),
    "delta": Tile(64, 0, 4, 1),
}
_WIDE_BIAS = Tile(32, 32, 8, 1)  # four tensors of head_dim 256 at once in shared memory
_FLOAT32: dict[int, Tile] = {64: Tile(64, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 32, 8, 1)}
_FLOAT32_DECODE: dict[int, Tile] = {64: Tile(16, 64, 4, 2), 128: Tile(16, 32, 4, 1), 256: Tile(16, 16, 4, 1)}
_INTERPRETER = Tile(32, 32, 4, 1)


def bucket(dim: int) -> int:
    """The head_dim bucket of the table: tiles are padded to powers of two."""
    return 64 if dim <= 64 else 128 if dim <= 128 else 256


def parts(dim: int, one_pass: bool = False) -> tuple[str, ...]:
    """The kernels that give dK and dV: above head_dim 128 the registers do not hold both."""
    if dim > 128:
        return ("dk", "dv")
    return ("one_pass",) if one_pass else ("keys",)


TUNED: dict[str, Tile] = {}
"""What ATTN_AUTOTUNE=1 found (tune.py), by `tuned_key`."""


def tuned_key(arch: str, name: str, dim: int, math: str, load: int) -> str:
    """What a tuned tile is good for."""
    return f"triton {triton.__version__} {arch} {name} {bucket(dim)} {math} {load}"


def tile(arch: str, name: str, dim: int, math: str, load: int) -> Tile:
    """The tile of one pass; `dim` is the larger head_dim, `math` how matrices are multiplied: "16", "tf32", "ieee"."""
    tuned = TUNED.get(tuned_key(arch, name, dim, math, load))
    if tuned is not None:
        return tuned
    family = FAMILY.get(arch, "small")
    if family == "interpreter":
        return _INTERPRETER._replace(rows=64) if name == "delta" else _INTERPRETER
    if math == "ieee" and ("ieee", name) in _TILES:
        family = "ieee"
    elif math != "16" and name != "delta":
        return (_FLOAT32_DECODE if name == "decode" else _FLOAT32)[bucket(dim)]
    elif name == "bias" and bucket(dim) == 256:
        return _WIDE_BIAS
    elif name in _COMMON:
        return _COMMON[name]
    found = _TILES.get((family, name)) or _TILES[family, "keys"]
    at = found.get(-bucket(dim) if dim % 16 else 0) or found[bucket(dim)]
    return at if isinstance(at, Tile) else at[load * (len(at) - 1) // 2]


ONE_PASS = os.environ.get("ATTN_TRITON_ONE_PASS", "0") not in ("", "0")
"""Whether the single-pass backward, not deterministic, is taken where it can be: opt-in until it has been timed."""


def one_pass(arch: str, dim: int, math: str, load: int) -> bool:
    """Whether the backward with dQ by atomics is wanted, and compiles without spills there."""
    if not ONE_PASS or load or math != "16":
        return False
    return bucket(dim) in _TILES.get((FAMILY.get(arch, "small"), "one_pass"), ())


def descriptors(arch: str) -> bool:
    """Whether blocks are loaded by tensor descriptors (TMA) where the strides allow it."""
    return FAMILY.get(arch, "small") in ("sm_90", "sm_100")


MOST_SPLITS = 64
"""Parts into which decoding splits the keys of a sequence: what the combining kernel holds in registers."""


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
