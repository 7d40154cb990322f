"""The CUDA toolkit: which one is here, whether it fits, and the commands by which it builds the CUDA library.

Standard library only, as `attn/toolchain.py`, whose rows and compilers it shares.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from attn import toolchain
from attn.toolchain import WINDOWS, Compiler, Row

PIN = (13, 0)
REQUIREMENT = "cuda-toolkit[nvcc,crt,nvvm,cccl,cudart]==13.0.2"
"""What `ATTN_CUDA=pip` builds with: all five parts are pinned by it, for one alone brings others of a newer release."""
PARTS = {
    "nvidia-cuda-nvcc": "13.0.88",
    "nvidia-cuda-crt": "13.0.88",
    "nvidia-nvvm": "13.0.88",
    "nvidia-cuda-cccl": "13.0.85",
    "nvidia-cuda-runtime": "13.0.96",
}
OLDEST, NEWEST_MAJOR = (12, 8), 13
ARCHS = "80+PTX;90a;120"
"""sm_80 code also runs on 86 and 89, sm_120 code on 121, and the driver compiles compute_80 PTX for all others."""
OLDEST_HOSTS = {"gcc": (9, 0), "clang": (10, 0), "msvc": (19, 30)}
GIB = 1 << 30
DISK, MEMORY = 1 * GIB, 2 * GIB
"""Needed: for the objects of a build, and for one compiler."""
CURES = f"ATTN_CUDA=pip builds with {REQUIREMENT}; ATTN_CUDA=0 leaves the CUDA kernels out"


@dataclass(frozen=True)
class Toolkit:
    """An nvcc that answered when it was asked for its version."""

    nvcc: str
    version: tuple[int, int]
    release: str  # such as "13.0.88"
    root: Path
    source: str  # how it was found: "ATTN_CUDA_HOME", "CUDA_HOME", "CUDA_PATH", "PATH" or "pip"

    def __str__(self) -> str:
        untested = "" if self.version == PIN else ", which is untested"
        return f"nvcc {self.release} from {self.source}{untested}"


@dataclass(frozen=True)
class Target:
    """The architectures to compile for: machine code for `archs`, and PTX for `ptx` where it is not ""."""

    archs: tuple[str, ...]
    ptx: str = ""

    def flags(self) -> list[str]:
        """As nvcc takes them."""
        made = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        return made + ([f"-gencode=arch=compute_{self.ptx},code=compute_{self.ptx}"] if self.ptx else [])


def target_of(text: str) -> Target | None:
    """From a list such as "80+PTX;90a;120"; None where it is none."""
    archs, ptx = [], ""
    for word in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d{2,3}[af]?)(\+PTX)?", word)
        if match is None:
            return None
        archs.append(match[1])
        ptx = match[1] if match[2] else ptx
    return Target(tuple(archs), ptx)


def _candidates(wish: str, environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """(how it was found, path of nvcc), the first to be taken."""
    name = "nvcc.exe" if WINDOWS else "nvcc"
    if wish == "pip":
        tree = Path("nvidia", "cu13", "bin", name)
        return [("pip", str(found)) for found in (Path(folder) / tree for folder in sys.path) if found.is_file()]
    if environ.get("ATTN_CUDA_HOME"):
        return [("ATTN_CUDA_HOME", str(Path(environ["ATTN_CUDA_HOME"], "bin", name)))]
    homes = [(v, str(Path(environ[v], "bin", name))) for v in ("CUDA_HOME", "CUDA_PATH") if environ.get(v)]
    on_path = shutil.which("nvcc", path=environ.get("PATH"))
    return [home for home in homes if Path(home[1]).is_file()] + ([("PATH", on_path)] if on_path else [])


def find_toolkit(wish: str = "auto") -> Toolkit | Row:
    """The toolkit that is used, or the row that says why there is none. `wish` is ATTN_CUDA's value."""
    need = f"{'.'.join(map(str, OLDEST))} to {NEWEST_MAJOR}.x, tested with {'.'.join(map(str, PIN))}"
    found = _candidates(wish, os.environ)
    if not found and wish == "pip":
        return Row("nvcc", "unfit", "", need, f"pip install '{REQUIREMENT}' where this build runs without isolation")
    if not found:
        return Row("nvcc", "missing", "", need, "ATTN_CUDA_HOME=... names a toolkit; ATTN_CUDA=pip brings one")
    source, nvcc = found[0]
    said = toolchain.says([nvcc, "--version"])
    match = re.search(r"release (\d+)\.(\d+), V([\d.]+)", said)
    if match is None:
        where = f"{nvcc} from {source}, which {'does not tell its version' if Path(nvcc).is_file() else 'is not there'}"
        return Row("nvcc", "unfit", where, need, f"ATTN_CUDA_HOME=... names a toolkit that works; {CURES}")
    version = int(match[1]), int(match[2])
    toolkit = Toolkit(nvcc, version, match[3], _root(nvcc), source)
    if version < OLDEST or version[0] > NEWEST_MAJOR:
        where = f"{match[3]} from {source} ({nvcc})"
        return Row("nvcc", "unfit", where, need, f"ATTN_CUDA_HOME=... names one; {CURES}")
    return toolkit


def _root(nvcc: str) -> Path:
    """The folder of the toolkit: nvcc on the path is often a script that calls another."""
    top = re.search(r"^#\$ TOP=(.+)$", toolchain.says([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull]), re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else Path(nvcc).resolve().parent.parent


def host_limit(toolkit: Toolkit, kind: str) -> tuple[int, int] | None:
    """The newest compiler of that kind that this toolkit's own header takes, as (major, minor); None: it sets none."""
    header = next((h for h in _found(toolkit, "include/crt/host_config.h") if h.is_file()), None)
    text = header.read_text(errors="replace") if header else ""
    if kind == "gcc" and (match := re.search(r"__GNUC__ > (\d+)", text)):
        return int(match[1]), 99
    if kind == "clang" and (match := re.search(r"__clang_major__ >= (\d+)", text)):
        return int(match[1]) - 1, 99
    if kind == "msvc" and (match := re.search(r"_MSC_VER >= (\d+)", text)):
        return (int(match[1]) - 1) // 100, (int(match[1]) - 1) % 100
    return None


def _found(toolkit: Toolkit, path: str) -> list[Path]:
    """Where a file of the toolkit may be: some have a folder per machine."""
    machines = sorted(toolkit.root.glob("targets/*"))
    return [folder / path for folder in (toolkit.root, *machines)]


def runtime(toolkit: Toolkit) -> Path | None:
    """The static runtime library, in the folder that this toolkit's layout has for it."""
    names = ("lib/x64/cudart_static.lib",) if WINDOWS else ("lib64/libcudart_static.a", "lib/libcudart_static.a")
    return next((file for name in names for file in _found(toolkit, name) if file.is_file()), None)


def check(compiler: Compiler, wish: str, scratch: Path) -> tuple[list[Row], Toolkit | None, Target]:
    """The table of checks before a build of the CUDA library, and what it is built with. `wish` is ATTN_CUDA's value,
    `scratch` the folder for the objects."""
    text = os.environ.get("ATTN_CUDA_ARCHS") or ARCHS
    target = target_of(text)
    toolkit = find_toolkit(wish)
    if isinstance(toolkit, Row):
        return [toolkit], None, target or Target(())
    need = f"{'.'.join(map(str, OLDEST))} to {NEWEST_MAJOR}.x"
    rows = [Row("nvcc", "ok", str(toolkit), need), _host_row(toolkit, compiler), _arch_row(text, target)]
    rows += _parts_rows(toolkit) if wish == "pip" else []
    rows += _room_rows(scratch)
    if runtime(toolkit) is None:
        cure = f"install the toolkit's static runtime (cuda-cudart-dev, or all of the toolkit); {CURES}"
        rows.append(Row("CUDA runtime", "unfit", "", "libcudart_static", cure))
    if all(row.state == "ok" for row in rows) and target is not None:
        rows.append(_probe_row(toolkit, compiler, target))
    return rows, toolkit, target or Target(())


def _host_row(toolkit: Toolkit, compiler: Compiler) -> Row:
    oldest, newest = OLDEST_HOSTS[compiler.kind], host_limit(toolkit, compiler.kind)
    if compiler.kind == "msvc":
        need = f"MSVC {oldest[0]}.{oldest[1]}" + (f" to {newest[0]}.{newest[1]}" if newest else " or newer")
        cure = "open the developer prompt of Visual Studio 2022"
    else:
        need = f"{compiler.kind} {oldest[0]}" + (f" to {newest[0]}" if newest else " or newer")
        cure = f"CXX=g++-{newest[0]}" if newest and compiler.kind == "gcc" else "CXX=... names one"
    fits = oldest <= compiler.version and (newest is None or compiler.version <= newest)
    found = f"{compiler.kind} {compiler.version[0]}.{compiler.version[1]}"
    return Row("nvcc's compiler", "ok" if fits else "unfit", found, need, f"{cure}; ATTN_CUDA=0 leaves CUDA out")


def _arch_row(text: str, target: Target | None) -> Row:
    oldest = min((int(arch.rstrip("af")) for arch in target.archs), default=0) if target else 0
    state = "ok" if oldest >= 80 else "unfit"
    return Row("architectures", state, text, f"like {ARCHS}, none below 80", f"ATTN_CUDA_ARCHS='{ARCHS}', or unset it")


def _parts_rows(toolkit: Toolkit) -> list[Row]:
    """Whether the packages beside a pip toolkit are of one release."""
    site = toolkit.root.parent.parent
    here = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions(path=[str(site)])}
    wrong = [f"{name} {here.get(name, 'missing')}" for name, version in PARTS.items() if here.get(name) != version]
    cure = f"pip install '{REQUIREMENT}', which pins them all"
    return [Row("pip packages", "unfit" if wrong else "ok", ", ".join(wrong) or "as pinned", "the pinned ones", cure)]


def _room_rows(scratch: Path) -> list[Row]:
    folder = next(f for f in (scratch.resolve(), *scratch.resolve().parents) if f.exists())
    disk, memory = shutil.disk_usage(folder).free, toolchain.free_memory()
    rows = [_room_row("disk", disk, DISK, f"free some on the disk of {folder}")]
    if memory is not None:
        rows.append(_room_row("memory", memory, MEMORY, "end other programs, or build on a larger machine"))
    return rows


def _room_row(item: str, have: int, need: int, cure: str) -> Row:
    state = "ok" if have >= need else "unfit"
    return Row(
        item, state, f"{have / GIB:.1f} GiB", f"{need / GIB:.0f} GiB free", f"{cure}; ATTN_CUDA=0 leaves CUDA out"
    )


PROBE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
__global__ void probe(__nv_bfloat16* x) { x[threadIdx.x] = __float2bfloat16(__half2float(__float2half(1.0f))); }
void launch(__nv_bfloat16* x) { probe<<<1, 32>>>(x); }
"""


def _probe_row(toolkit: Toolkit, compiler: Compiler, target: Target) -> Row:
    """A small kernel compiled as the real ones will be: what no version number tells."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cu"
        source.write_text(PROBE)
        command = compile_command(toolkit, compiler, source, source.with_suffix(".o"), target)
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    said = [line for line in (done.stderr + done.stdout).splitlines() if re.search("error|fatal", line, re.IGNORECASE)]
    failure = "" if done.returncode == 0 else " ".join(said[0].split()) if said else f"status {done.returncode}"
    need = "one that compiles"
    return Row("a first kernel", "unfit" if failure else "ok", failure or "compiles", need, CURES)


def compile_command(toolkit: Toolkit, compiler: Compiler, source: Path, object_: Path, target: Target) -> list[str]:
    """The command that makes an object, and beside it `object.d` with the files it read."""
    host = ["/EHsc", "/MD", "/utf-8"] if compiler.kind == "msvc" else ["-fPIC", "-fvisibility=hidden"]
    # A launcher before the compiler, such as ccache, is none of nvcc's. ptxas tells what benchmarks/cuda_sass.py reads.
    own = ["-std=c++17", "-O3", "--compress-mode=size", "-Xptxas=-v", *target.flags()]
    own += ["-ccbin", compiler.command[-1], "-Xcompiler", ",".join(host)]
    depends = ["-MD", "-MF", f"{object_}.d"]
    return [*toolchain.launcher(), toolkit.nvcc, *own, *depends, "-c", str(source), "-o", str(object_)]


def link_libraries(toolkit: Toolkit) -> tuple[str, ...]:
    """What the linker needs beside the objects: never the driver's library, which a machine without a GPU lacks."""
    library = runtime(toolkit)
    if library is None:
        raise FileNotFoundError(f"no libcudart_static in {toolkit.root}")
    return (str(library),) if WINDOWS else (str(library), "-lrt", "-lpthread", "-ldl")


def jobs() -> int:
    """How many nvcc run at once: as many as the memory holds."""
    memory = toolchain.free_memory()
    return toolchain.jobs() if memory is None else max(1, min(toolchain.jobs(), memory // MEMORY))
