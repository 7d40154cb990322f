"""Builds CUDA sources for the emulator with g++: the emulated library, and the C++ programs of these tests.

`python tests/cuda_host/build.py [sanitized]` makes the library and prints its path, for ATTN_CUDA_EMULATED. Two files
are compiled at a time, and only those that changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
OUT = ROOT / "build" / "cuda_host"
LIBRARY = "_native_cuda_host.so"
JOBS = 2

COMPILER = (*shlex.split(os.environ.get("ATTN_COMPILER_LAUNCHER", "")), os.environ.get("CXX", "g++"))
COMMON = ("-std=c++17", "-fPIC", "-g1", "-Wall", "-Wextra", "-DATTN_HOST", f"-I{HERE}", "-march=native")
FLAVOURS = {
    "plain": ("-O1",),
    "sanitized": ("-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
}


class BuildError(Exception):
    """What the compiler said."""


def why_not() -> str | None:
    """One sentence where nothing can be built here."""
    if not sys.platform.startswith("linux"):
        return "the emulator needs Linux"
    return None if shutil.which(COMPILER[-1]) else f"{COMPILER[-1]} is not here"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One build at a time in a folder, whatever process it is of."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{(done.stderr or done.stdout)[-6000:]}\nfrom: {shlex.join(command)}")


def _stale(target: Path, key: str) -> bool:
    stamp, record = Path(f"{target}.key"), Path(f"{target}.d")
    if not (target.exists() and stamp.exists() and record.exists() and stamp.read_text() == key):
        return True
    made = target.stat().st_mtime
    files = map(Path, re.findall(r"(?:\\ |\S)+", record.read_text().replace("\\\n", " ").partition(": ")[2]))
    return any(not file.exists() or file.stat().st_mtime > made for file in files)


def _compile(source: Path, target: Path, flavour: str) -> None:
    command = [*COMPILER, *COMMON, *FLAVOURS[flavour], "-MMD", "-MF", f"{target}.d"]
    command += ["-x", "c++", "-c", str(source), "-o", str(target)]
    if source.parent.name == "emulator":
        command.append("-O2")
    key = hashlib.sha256("\0".join(command).encode()).hexdigest()
    if _stale(target, key):
        _run(command)
        Path(f"{target}.key").write_text(key)


def objects(sources: Sequence[Path], folder: Path, flavour: str) -> list[Path]:
    """The objects of these sources, compiled where they are not up to date."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = [folder / f"{source.parent.name}_{source.name}.o" for source in sources]
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(lambda pair: _compile(*pair, flavour), zip(sources, targets, strict=True)))
    return targets


def emulator_objects(flavour: str) -> list[Path]:
    """The emulator itself."""
    with _locked(OUT / flavour):
        return objects(sorted((HERE / "emulator").glob("*.cpp")), OUT / flavour, flavour)


def kernel_objects(flavour: str) -> list[Path]:
    """Kernels, binding, and what stands between them and the emulator."""
    host = [HERE / name for name in ("control.cpp", "device_host.cpp", "watch.cpp")]
    with _locked(OUT / flavour):
        return objects([*kernel_sources(), *host], OUT / flavour, flavour)


def _relink(target: Path, parts: Sequence[Path], command: Sequence[str]) -> Path:
    if not target.exists() or any(part.stat().st_mtime > target.stat().st_mtime for part in parts):
        scratch = target.with_name(f"{target.name}.{os.getpid()}")
        _run([*command, "-o", str(scratch)])
        scratch.replace(target)  # a process may have the old one loaded
    return target


def kernel_sources() -> list[Path]:
    """All of csrc/cuda that is compiled, but for the device's own device.cu."""
    cuda = CSRC / "cuda"
    sources = [*cuda.glob("*.cu"), *cuda.glob("inst/*.cu"), cuda / "bind_cuda.cpp"]
    return sorted(source for source in sources if source.name != "device.cu")


def link_library(parts: Sequence[Path], target: Path, flavour: str) -> Path:
    """The shared library of these objects. It names libtorch as what it needs without a torch to link with."""
    torch = target.parent / "libtorch.so"
    if not torch.exists():
        _run([*COMPILER, "-shared", "-nostdlib", "-x", "c++", os.devnull, "-Wl,-soname,libtorch.so", "-o", str(torch)])
    needs = [f"-L{torch.parent}", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    # Calls of what launch.h declares go through watch.cpp.
    wraps = [f"-Wl,--wrap={name}" for name in re.findall(r'"(_ZN4attn4cuda\w+)"', (HERE / "watch.cpp").read_text())]
    return _relink(target, parts, [*COMPILER, *FLAVOURS[flavour], "-shared", *map(str, parts), *needs, *wraps])


def library(flavour: str = "plain") -> Path:
    """The emulated library, for ATTN_CUDA_EMULATED."""
    parts = emulator_objects(flavour) + kernel_objects(flavour)
    with _locked(OUT / flavour):
        return link_library(parts, OUT / flavour / LIBRARY, flavour)


def program(source: Path, folder: Path | None = None, flavour: str = "plain") -> Path:
    """A program of one source and the emulator, in `folder`."""
    folder = folder or OUT / flavour
    emulator = emulator_objects(flavour)
    with _locked(OUT / flavour):
        parts = emulator + objects([source], folder, flavour)
        return _relink(folder / source.stem, parts, [*COMPILER, *FLAVOURS[flavour], *map(str, parts)])


if __name__ == "__main__":
    if (reason := why_not()) is not None:
        raise SystemExit(reason)
    try:
        print(library(*sys.argv[1:]))
    except BuildError as error:
        raise SystemExit(str(error)) from None
