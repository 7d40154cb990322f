"""A copy of the source tree whose compiled library is built in another way, for tests that need one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from attn import toolchain

ROOT = Path(__file__).resolve().parent.parent
COMPILER = toolchain.find_compiler()
HERE = sys.platform.startswith("linux") and (ROOT / "setup.py").is_file()
CANNOT = "" if HERE and COMPILER and COMPILER.kind == "gcc" else "needs Linux, gcc and the source tree"
"""Why it cannot be built here."""


def copy_sources(folder: Path) -> Path:
    """The tree without what was built of it; `folder` must not exist."""
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "out", "*.so")
    return Path(shutil.copytree(ROOT, folder, ignore=left_out))


def replace(file: Path, old: str, new: str) -> None:
    """Change a copied file, in which `old` must stand once."""
    text = file.read_text()
    assert text.count(old) == 1, f"{file.name} has changed: {old!r} stands there {text.count(old)} times"
    file.write_text(text.replace(old, new))


def build(tree: Path, sets: Sequence[str], **variables: str) -> None:
    """Build the library of a copied tree with these instruction sets alone (each takes a minute or more)."""
    replace(tree / "setup.py", "toolchain.available_sets(compiler)", repr(list(sets)))
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    env = os.environ | {"ATTN_CPP": "1", "ATTN_CUDA": "0"} | variables
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
