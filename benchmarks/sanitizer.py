"""compute-sanitizer over a few small cases of a backend, where that tool is on the path. Not run on hardware yet."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

TOOL = "compute-sanitizer"
KINDS = ("memcheck", "racecheck")
SITUATIONS = ("causal", "lengths_end", "varlen_all", "decode_paged")
"""Of `attn.testing.matrix`: all passes, odd sizes, every way in which memory is found."""
FOUND = 9
"""The exit status by which the tool says that it found something."""


@dataclass
class Sanitized:
    """One tool on one backend; `ok` is None where it did not come to an end."""

    kind: str
    backend: str
    ok: bool | None
    seconds: float
    said: str


def missing() -> str | None:
    """Why there is nothing to run, or None."""
    if not torch.cuda.is_available():
        return f"{TOOL} watches kernels on a GPU, and there is none"
    return None if shutil.which(TOOL) else f"{TOOL} is not on the path; it comes with the CUDA toolkit"


def command(kind: str, backend: str) -> list[str]:
    """What is run: the suite itself, with the cases alone."""
    suite = [sys.executable, "-m", "attn.benchmarks.gpu_suite", "--part", "cases", "--backend", backend]
    return [TOOL, "--tool", kind, "--error-exitcode", str(FOUND), *suite]


def run(backends: tuple[str, ...], until: float) -> list[Sanitized]:
    """Every kind on every backend; each gets an equal share of what time is left."""
    found: list[Sanitized] = []
    pairs = [(kind, backend) for kind in KINDS for backend in backends]
    # In torch's own pool of memory a read past the end of a tensor is a read of another one, and goes unseen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for n, (kind, backend) in enumerate(pairs):
        start = time.monotonic()
        limit = (until - start) / (len(pairs) - n)
        if limit <= 0:
            found.append(Sanitized(kind, backend, None, 0.0, "no time was left"))
            continue
        try:
            done = subprocess.run(
                command(kind, backend), capture_output=True, text=True, timeout=limit, env=environment
            )
        except subprocess.TimeoutExpired:
            found.append(Sanitized(kind, backend, None, round(limit, 1), f"not done after {limit:.0f} s"))
            continue
        said = "\n".join((done.stdout + done.stderr).splitlines()[-12:])
        found.append(Sanitized(kind, backend, done.returncode == 0, round(time.monotonic() - start, 1), said))
    return found
