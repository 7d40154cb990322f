"""The compiled library of the CUDA kernels: when it is loaded, why it is not, and its ops.

With ATTN_CUDA_EMULATED=<path> a library in which an emulator runs the same kernels is loaded in its place; its ops take
CPU tensors.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch

from attn import native

EMULATED = os.environ.get("ATTN_CUDA_EMULATED", "")
"""Path of the emulated library, read once; "" where there is none."""

_library = native.define("attn_cuda", native.PASSES, ("AutogradCUDA", "AutogradCPU"))
forward, weights, backward, decode = (
    native.op("attn_cuda", name) for name in ("forward", "weights", "backward", "decode")
)


def path() -> Path:
    """Where the library is, if it was built."""
    return Path(EMULATED) if EMULATED else native.path("cuda")


@functools.cache
def load() -> str | None:
    """Load the library once; one sentence with the cure where that is not possible or nothing of it could run."""
    if not EMULATED and torch.version.cuda is None:
        return "this build of torch has no CUDA; with an NVIDIA GPU, install the build that pytorch.org names for it"
    if not path().is_file():
        if EMULATED:
            return f"ATTN_CUDA_EMULATED is {EMULATED}, where no file is; python tests/cuda_host/build.py makes it"
        why = native.build_info().get("why_no_cuda") or "this source tree has not been built"
        return f"its library is not here: {why}; ATTN_CUDA=pip pip install . in the source tree builds it"
    try:
        said = _open().attn_cuda_unusable().decode()
    except (OSError, AttributeError) as error:  # the latter: a library of another version
        return f"its library does not load ({error}); pip install --force-reinstall attn-kernels builds it anew"
    if not said and not EMULATED and not torch.cuda.is_available():
        return "finds no GPU"
    return said or None


@functools.cache
def _open() -> ctypes.CDLL:
    library = ctypes.CDLL(str(path()))  # its ops are registered as it is loaded
    library.attn_cuda_unusable.argtypes, library.attn_cuda_unusable.restype = [], ctypes.c_char_p
    library.attn_cuda_poison.argtypes, library.attn_cuda_poison.restype = [ctypes.c_int], None
    return library


def poison(on: bool) -> None:
    """Whether new outputs start as NaN, so that a test sees what a kernel does not write."""
    if load() is None:
        _open().attn_cuda_poison(int(on))


def images() -> dict[str, Any]:
    """{"archs": ["80", "90a", ...], "ptx": "80" or ""} as the build wrote it down; empty where it did not."""
    cuda: dict[str, Any] = native.build_info().get("cuda_images") or {}
    return cuda


def runs_on(arch: int, built: dict[str, Any]) -> bool:
    """Whether a library of these images runs on a GPU of compute capability `arch` (80, 86, ...)."""
    for name in built.get("archs", ()):
        number = int(name.rstrip("af"))
        exact = name.endswith("a")  # code for one architecture alone; all other code runs on its whole major version
        if number == arch or (not exact and number // 10 == arch // 10 and number <= arch):
            return True
    return bool(built.get("ptx")) and int(built["ptx"]) <= arch
