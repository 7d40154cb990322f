"""The CUDA kernels without a GPU: the same sources, run by the emulator in cuda_host/ on CPU tensors.

The backend takes CPU tensors only where the emulated library is named before `attn` is imported, so that each of these
has a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_host import build

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


def emulated(*args: str, **more: str) -> str:
    """Run pytest with the emulated library; returns what it printed, and fails with it."""
    env = os.environ | {"ATTN_CUDA_EMULATED": str(build.library()), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args]
    done = subprocess.run(command, cwd=ROOT, env=env | more, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def test_the_kernels_in_the_emulator() -> None:
    last = emulated("tests/emulated_cuda").strip().splitlines()[-1]
    passed = re.search(r"(\d+) passed", last)
    assert passed is not None
    assert int(passed[1]) > 100
    assert "skipped" not in last


@pytest.mark.slow
def test_more_of_the_kernels_in_the_emulator() -> None:
    assert "passed" in emulated("tests/emulated_cuda", "-m", "slow")


@pytest.mark.slow
def test_the_module_on_random_configurations() -> None:
    """The differential test against nn.MultiheadAttention, with this backend forced."""
    said = emulated("tests/test_module_differential.py", "-s", ATTN_TEST_BACKEND="cuda")
    served = re.search(r"compared (\d+).*mismatches 0; served by cuda (\d+)", said)
    assert served is not None
    assert min(int(served[1]), int(served[2])) > 150
