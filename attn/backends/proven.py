"""Where a GPU kernel has passed: nothing unproven runs by accident.

Two things prove a pass: an entry in PROVEN, written when the results of the GPU suite from that architecture are
committed under `benchmarks/results/`; or a stamp, which `python -m attn verify` leaves in the user's cache folder for
this very GPU, driver, torch, triton and attn. Until then the planner passes such a backend by, `use_backend` and
`backend=` still force it, and the first forced call warns.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch

from attn import user_cache
from attn.spec import AttentionSpec

Entry = tuple[str, str, torch.dtype, str]
"""(backend, arch, dtype, pass), pass one of "forward", "backward", "decode"."""

PROVEN: frozenset[Entry] = frozenset()
"""Empty: no kernel has run on hardware."""

STAMPS = "verified.json"


def passes(spec: AttentionSpec) -> tuple[str, ...]:
    """The passes that a call of this spec runs."""
    if spec.op == "decode":
        return ("decode",)
    return ("forward", "backward") if spec.grad else ("forward",)


def why_not(backend: str, spec: AttentionSpec) -> str | None:
    """None if every pass of `spec` is proven for `backend` on this architecture, else one sentence with the cure."""
    missing = [
        p
        for p in passes(spec)
        if (backend, spec.arch, spec.dtype, p) not in PROVEN and not _is_stamped(backend, spec.arch, spec.dtype, p)
    ]
    if not missing:
        return None
    where = spec.arch or spec.device
    return (
        f"no committed results show its {' and '.join(missing)} pass right on {where} "
        f"({str(spec.dtype).removeprefix('torch.')}); python -m attn verify checks it on this machine, and "
        f"backend={backend!r} forces it"
    )


def _is_stamped(backend: str, arch: str, dtype: torch.dtype, which: str) -> bool:
    """Asked while torch.compile traces, too, which must not trace the reading of a file."""
    return _words((backend, arch, dtype, which)) in stamped()


# What torch.compiler.assume_constant_result does, which would import torch._dynamo, and with it triton, here and now.
_is_stamped._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def stamped() -> frozenset[str]:
    """What `python -m attn verify` has seen pass on this machine as it is now, an entry a line."""
    stamps = user_cache.read(STAMPS)
    found = stamps.get(machine()) if stamps else None  # to name the machine costs a second, and most have no stamp
    return frozenset(map(str, found)) if isinstance(found, list) else frozenset()


def stamp(passed: Iterable[Entry], failed: Iterable[Entry]) -> bool:
    """Add entries to the stamps of this machine and take others away; False where they cannot be written."""
    now = (stamped() | set(map(_words, passed))) - set(map(_words, failed))
    stamped.cache_clear()
    return user_cache.write(STAMPS, {**user_cache.read(STAMPS), machine(): sorted(now)})


def _words(entry: Entry) -> str:
    backend, arch, dtype, which = entry
    return f"{backend} {arch} {str(dtype).removeprefix('torch.')} {which}"


def machine() -> str:
    """The GPU, its driver, and all software that makes a kernel what it is here, as one line."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    try:
        import triton

        compiler = str(triton.__version__)
    except ImportError:
        compiler = "none"
    words = {"gpu": gpu, "driver": _driver(), "torch": torch.__version__, "triton": compiler, "attn": _kernels()}
    return ", ".join(f"{name} {word}" for name, word in words.items())


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].strip()
    except (OSError, IndexError):  # another system, or AMD's: what torch knows of it
        version = getattr(torch._C, "_cuda_getDriverVersion", None)
        return str(version()) if version and torch.cuda.is_available() else "unknown"


def _kernels() -> str:
    """A short hash of the package's own files: a changed kernel is another one."""
    package = Path(__file__).parent.parent
    folders = {package, package / "triton_kernels", package.parent / "triton_kernels"}
    files = [f for folder in folders if folder.is_dir() for f in folder.iterdir() if f.suffix in (".py", ".so", ".dll")]
    found = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.name):
        found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()[:16]
