"""Builds of copies of the source tree, for the tests of the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def built(what: str, source: Path, target: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A run of the project's own build backend; without the CUDA kernels, whose compilation takes minutes, unless asked
    for."""
    target.mkdir(parents=True, exist_ok=True)
    code = f"import sys; sys.path.insert(0, 'csrc'); import build_backend as b; b.build_{what}(sys.argv[1])"
    return subprocess.run(
        [sys.executable, "-c", code, str(target)],
        cwd=source,
        capture_output=True,
        text=True,
        env=os.environ | {"ATTN_CPP": "auto", "ATTN_CUDA": "0"} | env,
    )


def build(what: str, source: Path, target: Path, **env: str) -> Path:
    """A wheel or an sdist."""
    done = built(what, source, target, **env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    (made,) = target.iterdir()
    return made


def keep_objects(target: Path) -> None:
    """What was compiled here need not be compiled again in a copy."""
    if (ROOT / "build" / "objects").is_dir():
        shutil.copytree(ROOT / "build" / "objects", target / "build" / "objects")


def copy_of_sources(target: Path) -> Path:
    """A copy of the source tree, with what was compiled in it."""
    left_out = shutil.ignore_patterns(".*cache*", ".venv", ".git", ".benchmarks", "__pycache__", "build", "dist", "out")
    shutil.copytree(ROOT, target, ignore=left_out)
    keep_objects(target)
    return target
