"""Tests of the Triton kernels on CPU tensors: collected only where TRITON_INTERPRET=1 is set before Triton is imported.

`tests/test_triton.py` runs this folder in a process of its own; by hand: TRITON_INTERPRET=1 pytest tests/interpreted
"""

from __future__ import annotations

import os
import warnings

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _quiet() -> object:
    """inf - inf in rows that are masked afterwards is meant; numpy, which plays the GPU, would warn."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        yield
