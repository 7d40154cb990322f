"""The C++ compiler: which one is here, whether it fits, and the commands by which it builds a library of `csrc/`.

Standard library only: setup.py loads this file by its path, before anything is installed, and `python -m attn info`
shows the same table afterwards.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

WINDOWS, MACOS = sys.platform == "win32", sys.platform == "darwin"
OLDEST = {"gcc": (9, 0), "clang": (10, 0), "msvc": (19, 20)}
NAMES = {"gcc": "gcc 9", "clang": "clang 10", "msvc": "MSVC 19.20 (Visual Studio 2019)"}

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
SETS = {  # instruction set -> machine, flags of gcc and clang, flags of MSVC
    "avx2": ("x86_64", _AVX2, ("/arch:AVX2",)),
    "avx512": ("x86_64", _AVX512, ("/arch:AVX512",)),
    "avx512bf16": ("x86_64", (*_AVX512, "-mavx512bf16"), ("/arch:AVX512",)),
    "amx": ("x86_64", (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"), ("/arch:AVX512",)),
    "neon": ("aarch64", (), ()),
}
"""A source whose name ends in `_<set>` is compiled with the flags of that set alone, all others for any CPU of the
machine: which set runs is decided when the library is loaded."""
LINUX_ONLY = frozenset({"amx"})
"""Sets whose registers are asked for in the way of Linux."""
_SAMPLES = {
    "avx512bf16": "__m512bh sample(__m512 x) { return _mm512_cvtne2ps_pbh(x, x); }\n",
    "amx": "void sample() { _tile_release(); }\n",
}
"""Instructions that the assembler beside a compiler may not know, where the compiler does."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that answered when it was asked for its version."""

    kind: str  # "gcc", "clang" or "msvc"
    version: tuple[int, int]
    command: tuple[str, ...]
    machine: str  # what it compiles for: "x86_64", "aarch64", ...

    def __str__(self) -> str:
        return f"{self.kind} {self.version[0]}.{self.version[1]} for {self.machine} ({shlex.join(self.command)})"


@dataclass(frozen=True)
class Row:
    """One line of the table of checks; `state` is "ok", "missing" or "unfit"."""

    item: str
    state: str
    found: str
    need: str
    cure: str = ""


def table(rows: list[Row]) -> str:
    """The checks for a reader, a line of cure below each that failed."""
    lines = []
    for row in rows:
        lines.append(f"  {row.state.upper():8}{row.item:16}found {row.found or 'none'}; need {row.need}")
        if row.state != "ok":
            lines.append(f"          cure: {row.cure}")
    return "\n".join(lines)


def find_compiler() -> Compiler | None:
    """$CXX, or the usual one of the platform; None where there is none that runs."""
    if WINDOWS:
        return _msvc()
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        found = _unix_compiler(tuple(command))
        if found is not None:
            return found
    return None


def _unix_compiler(command: tuple[str, ...]) -> Compiler | None:
    macros = says([*command, "-dM", "-E", "-x", "c++", os.devnull])

    def number(name: str) -> int:
        match = re.search(rf"^#define {name} (\d+)", macros, re.MULTILINE)
        return int(match[1]) if match else 0

    kind, prefix, minor = ("clang", "__clang", "_minor__") if number("__clang__") else ("gcc", "__GNUC", "_MINOR__")
    major = number("__clang_major__" if kind == "clang" else "__GNUC__")
    if not major:
        return None
    machine = next((m for m in ("x86_64", "aarch64") if number(f"__{m}__")), platform.machine())
    return Compiler(kind, (major, number(prefix + minor)), command, machine)


def _msvc() -> Compiler | None:
    match = re.search(r"Version (\d+)\.(\d+)\S* for (\w+)", says(["cl"]))
    if match is None:
        return None
    machine = {"x64": "x86_64", "ARM64": "aarch64"}.get(match[3], match[3])
    return Compiler("msvc", (int(match[1]), int(match[2])), ("cl",), machine)


def says(command: list[str]) -> str:
    """What a command prints, "" where it does not run."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout + done.stderr


def check() -> list[Row]:
    """The table of checks before a build of the CPU library."""
    need = " or ".join(NAMES[kind] for kind in (("msvc",) if WINDOWS else ("gcc", "clang"))) + " or newer"
    compiler = find_compiler()
    if compiler is None:
        named = os.environ.get("CXX", "")
        cure = "open the developer prompt of Visual Studio" if WINDOWS else "install g++, or name a compiler by CXX=..."
        return [Row("C++ compiler", "missing", named and f"CXX={named}, which does not run", need, cure)]
    if compiler.version < OLDEST[compiler.kind]:
        cure = "CXX=... names a newer one; ATTN_CPP=0 installs without the C++ kernels"
        return [Row("C++ compiler", "unfit", str(compiler), need, cure)]
    rows = [Row("C++ compiler", "ok", str(compiler), need)]
    failure = _failure(compiler, (), "#include <cmath>\n#include <cstdint>\n#include <stdexcept>\n")
    if failure:
        cure = "install the C++ standard library's headers (Debian: g++); ATTN_CPP=0 installs without the C++ kernels"
        rows.append(Row("a first program", "unfit", failure, "one that compiles", cure))
    return rows


def available_sets(compiler: Compiler) -> list[str]:
    """The instruction sets that the compiler has flags and intrinsics for, and its assembler instructions."""
    found = []
    for name, (machine, *flags) in SETS.items():
        own = flags[1] if compiler.kind == "msvc" else flags[0]
        header = "arm_neon.h" if machine == "aarch64" else "immintrin.h"
        if name in LINUX_ONLY and not sys.platform.startswith("linux"):
            continue
        program = f"#include <{header}>\n{_SAMPLES.get(name, '')}"
        if machine == compiler.machine and not _failure(compiler, own, program):
            found.append(name)
    return found


def _failure(compiler: Compiler, flags: tuple[str, ...], program: str) -> str:
    """The first line of complaint about a program, "" where it compiles."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(program + "int probe() { return 0; }\n")
        command = compile_command(compiler, source, source.with_suffix(".o"), flags)
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode == 0:
        return ""
    said = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line]
    return said[0] if said else f"status {done.returncode}"


def flags_of(source: Path, compiler: Compiler, sets: list[str]) -> tuple[str, ...] | None:
    """The flags of a source by its name and the sets that are built; None where it belongs to a set that is not."""
    macros = tuple(f"-DATTN_HAVE_{name.upper()}" for name in sets)
    ending = source.stem.rpartition("_")[2]
    if ending not in SETS:
        return macros
    if ending not in sets:
        return None
    return (*macros, *SETS[ending][2 if compiler.kind == "msvc" else 1])


def launcher() -> list[str]:
    """What a user puts before every compiler, such as ccache."""
    return shlex.split(os.environ.get("ATTN_COMPILER_LAUNCHER", ""))


def compile_command(compiler: Compiler, source: Path, target: Path, flags: tuple[str, ...]) -> list[str]:
    """The command that makes an object, and beside it `target.d` (MSVC: `target.json`) with the files it read."""
    users = shlex.split(os.environ.get("CXXFLAGS", ""))
    if compiler.kind == "msvc":
        own = ["/nologo", "/std:c++17", "/O2", "/EHsc", "/MD", "/utf-8", f"/sourceDependencies{target}.json"]
        return [*launcher(), *compiler.command, *own, *flags, *users, "/c", str(source), f"/Fo{target}"]
    own = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-fno-math-errno"]
    depends = ["-MD", "-MF", f"{target}.d"]
    return [*launcher(), *compiler.command, *own, *flags, *users, *depends, "-c", str(source), "-o", str(target)]


def link_commands(
    compiler: Compiler, objects: list[Path], target: Path, headers: dict[str, Path], libraries: tuple[str, ...] = ()
) -> list[list[str]]:
    """The commands that make a library. It must name libtorch as what it needs, for torch loads its own libraries
    where a plugin does not see them, and it must do so without a torch: `headers` tells, for each library of torch,
    the functions that are used. `libraries` are linked in."""
    users = shlex.split(os.environ.get("LDFLAGS", ""))
    names, scratch = [*map(str, objects), *libraries], objects[0].parent
    if compiler.kind == "msvc":
        machine = {"x86_64": "x64", "aarch64": "arm64"}[compiler.machine]
        commands, imports = [], []
        for library, header in headers.items():
            functions = scratch / f"{library}.def"
            functions.write_text("\n".join([f"LIBRARY {library}.dll", "EXPORTS", *torch_functions(header)]) + "\n")
            imports.append(str(scratch / f"{library}.lib"))
            commands.append(["lib", "/nologo", f"/def:{functions}", f"/machine:{machine}", f"/out:{imports[-1]}"])
        return [*commands, [*compiler.command, "/nologo", "/LD", *names, *imports, f"/Fe{target}", *users]]
    if MACOS:
        dynamic = ["-dynamiclib", "-undefined", "dynamic_lookup", "-Wl,-install_name,@rpath/" + target.name]
        return [[*compiler.command, *dynamic, *names, "-o", str(target), *users]]
    empty = [*compiler.command, "-shared", "-o", str(scratch / "libtorch.so"), "-Wl,-soname,libtorch.so"]
    needed = [f"-L{scratch}", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-Wl,--exclude-libs,ALL"]
    return [
        [*empty, "-nostdlib", "-x", "c++", os.devnull],
        [*compiler.command, "-shared", *names, "-o", str(target), *needed, *users],
    ]


def torch_functions(header: Path) -> list[str]:
    """The functions of torch that a header of ours declares."""
    return re.findall(r"^ATTN_TORCH_API int32_t (\w+)\(", header.read_text(), re.MULTILINE)


def dependencies(target: Path) -> list[Path] | None:
    """The files that an object was made from; None where that is not known."""
    record = Path(f"{target}.d")
    if record.is_file():
        text = record.read_text().replace("\\\n", " ").partition(": ")[2]
        return [Path(word) for word in re.findall(r"(?:\\ |\S)+", text)]
    record = Path(f"{target}.json")
    if record.is_file():
        import json

        data = json.loads(record.read_text())["Data"]
        return [Path(data["Source"]), *map(Path, data["Includes"])]
    return None


@functools.cache
def jobs() -> int:
    """How many compilers run at once: MAX_JOBS, else one per core."""
    wish = os.environ.get("MAX_JOBS", "")
    return max(1, int(wish)) if wish.isdecimal() else os.cpu_count() or 1


def free_memory() -> int | None:
    """Bytes of memory that programs can have; None where the system does not say."""
    if WINDOWS:
        return None
    try:
        match = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None
