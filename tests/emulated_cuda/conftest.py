"""Tests of the CUDA kernels on CPU tensors: collected only where ATTN_CUDA_EMULATED names the emulated library.

`tests/test_cuda.py` builds that library and runs this folder in a process of its own; by hand:
ATTN_CUDA_EMULATED=$(python tests/cuda_host/build.py) pytest tests/emulated_cuda
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from attn import native_cuda

if not os.environ.get("ATTN_CUDA_EMULATED"):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every output starts as NaN: what a kernel does not write shows."""
    native_cuda.poison(True)
    yield
    native_cuda.poison(False)
