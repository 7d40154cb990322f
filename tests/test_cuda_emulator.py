"""The emulator in cuda_host/: every report it can give, and a small kernel that runs clean in it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cuda_host import build

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

FLAVOURS = ["plain", pytest.param("sanitized", marks=pytest.mark.slow)]


def run(program: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program], capture_output=True, text=True)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", ["reports", "product"])
def test_program(name: str, flavour: str) -> None:
    done = run(build.program(build.HERE / f"{name}.cpp", flavour=flavour))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_fibers_without_assembly(tmp_path: Path) -> None:
    """On other processors than x86-64 the C library switches between stacks."""
    sources = [*(build.HERE / "emulator").glob("*.cpp"), build.HERE / "reports.cpp"]
    command = [*build.COMPILER, *build.COMMON, "-DEMU_UCONTEXT", "-x", "c++", *sources, "-o", tmp_path / "reports"]
    subprocess.run(command, check=True, capture_output=True)
    done = run(tmp_path / "reports")
    assert done.returncode == 0, done.stdout + done.stderr
