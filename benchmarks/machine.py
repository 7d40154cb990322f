"""What figures were taken on."""

from __future__ import annotations

import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import attn
from attn import native
from attn.spec import arch_of

SAME = ("cpu", "threads", "isa", "gpu", "arch")
"""What must be the same for two runs to be compared."""


def machine() -> dict[str, Any]:
    """Versions, processor, GPU and clocks; no name of the machine and no path."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version_of_triton(),
        "attn": attn.__version__,
        "system": platform.platform(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "isa": native.isa if native.load() is None else None,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found |= {"gpu": p.name, "arch": arch_of("cuda", 0), "memory": p.total_memory, "sms": p.multi_processor_count}
        found["clocks"] = clocks()
    return found


def clocks() -> str:
    """SM clock, power and temperature as the driver tells them, or why not."""
    asked = "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu,driver_version"
    try:
        done = subprocess.run(
            ["nvidia-smi", asked, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {type(error).__name__}"
    return done.stdout.strip() or "unknown"


def _version_of_triton() -> str | None:
    try:
        import triton
    except ModuleNotFoundError:
        return None
    return str(triton.__version__)


def _processor() -> str:
    """The model as Linux names it, else what Python knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
