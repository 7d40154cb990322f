"""Where the packages come from, and the build of the compiled library; all else is in pyproject.toml.

Two folders of the repository are installed under another name:

    triton_kernels/  ->  attn.triton_kernels      (a top-level `triton_kernels` belongs to another project)
    benchmarks/      ->  attn.benchmarks          (so that benchmarks also run from a wheel)

`csrc/cpu/` becomes attn/_native_cpu.so, without torch and without Python's headers: see csrc/README.md. Environment:

    ATTN_CPP=auto        build it where a C++ compiler is found (the default); 1: fail without; 0: leave it out
    CXX, CXXFLAGS, LDFLAGS, MAX_JOBS, ATTN_COMPILER_LAUNCHER (such as ccache)
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MOVED = {"attn.triton_kernels": "triton_kernels", "attn.benchmarks": "benchmarks"}
OBJECTS = Path("build/objects")
"""Kept between builds, as pip's own folder is not; relative as all paths in commands: a copied tree keeps it."""
BUILDS = {"build", "build_py", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"}


def _toolchain():
    """attn/toolchain.py, without importing the package."""
    spec = importlib.util.spec_from_file_location("attn_toolchain", ROOT / "attn" / "toolchain.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


toolchain = _toolchain()


def packages() -> list[str]:
    """Every package to install, by its installed name."""
    names = find_packages(str(ROOT), include=["attn", "attn.*"])
    for name, folder in MOVED.items():
        names += [name, *(f"{name}.{sub}" for sub in find_packages(str(ROOT / folder)))]
    return names


def decide() -> dict:
    """What will be built, as attn/_build_info.py will say; ends the build with a table where it cannot be right."""
    wish = os.environ.get("ATTN_CPP", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"attn: ATTN_CPP is {wish!r}; it must be auto, 1 or 0")
    info = {"cpu": False, "why_no_cpu": "", "compiler": "", "sets": []}
    if wish == "0":
        return info | {"why_no_cpu": "it was built with ATTN_CPP=0"}
    rows = toolchain.check()
    print(toolchain.table(rows), flush=True)
    bad = [row for row in rows if row.state == "unfit" or (row.state == "missing" and wish == "1")]
    if bad:
        raise SystemExit(f"attn: cannot build; nothing was compiled\n{toolchain.table(bad)}")
    if any(row.state == "missing" for row in rows):
        return info | {"why_no_cpu": "no C++ compiler was found when it was built"}
    compiler = toolchain.find_compiler()
    return info | {"cpu": True, "compiler": str(compiler), "sets": toolchain.available_sets(compiler)}


def write_info(folder: Path) -> None:
    """attn/_build_info.py: what `python -m attn info` says of this build. A library of an earlier build goes."""
    folder.mkdir(parents=True, exist_ok=True)
    if not INFO["cpu"]:
        for library in folder.glob("_native_cpu.*"):
            library.unlink()
    (folder / "_build_info.py").write_text(f'"""Written by the build."""\n\nINFO = {INFO!r}\n')


class Build(build_ext):
    """Compiles and links without setuptools' flags: the library is no Python module. Only what changed is compiled."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + (".dll" if toolchain.WINDOWS else ".so")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def run(self) -> None:
        super().run()
        if self.inplace:
            write_info(ROOT / "attn")

    def build_extension(self, ext: Extension) -> None:
        compiler = toolchain.find_compiler()
        scratch = OBJECTS / f"{sys.platform}-{compiler.machine}"
        scratch.mkdir(parents=True, exist_ok=True)
        work = []
        for source in map(Path, ext.sources):
            flags = toolchain.flags_of(source, compiler, INFO["sets"])
            if flags is not None:
                target = scratch / (source.as_posix().replace("/", "_") + ".o")
                work.append((source, target, toolchain.compile_command(compiler, source, target, flags)))
        stale = [job for job in work if changed(*job[1:])]
        print(f"attn: {ext.name}: {len(stale)} of {len(work)} files to compile", flush=True)
        with ThreadPoolExecutor(toolchain.jobs()) as pool:
            list(pool.map(lambda job: compile_one(*job), stale))
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        header = Path("csrc/torch_stable.h")
        for command in toolchain.link_commands(
            compiler, [target for _, target, _ in work], library, {"torch_cpu": header}
        ):
            run(command)


def stamp_of(target: Path, command: list[str]) -> tuple[Path, str]:
    return Path(f"{target}.command"), hashlib.sha256("\0".join(command).encode()).hexdigest()


def changed(target: Path, command: list[str]) -> bool:
    """Whether an object has to be made anew: another command, or a file that it was made from is newer."""
    stamp, key = stamp_of(target, command)
    if not (target.exists() and stamp.exists() and stamp.read_text() == key):
        return True
    made, files = target.stat().st_mtime, toolchain.dependencies(target)
    if files is None:
        return True
    return any(not file.exists() or file.stat().st_mtime > made for file in files)


def compile_one(source: Path, target: Path, command: list[str]) -> None:
    stamp, key = stamp_of(target, command)
    stamp.unlink(missing_ok=True)
    started = time.monotonic()
    run(command)
    stamp.write_text(key)
    print(f"attn: {source.as_posix()}: {time.monotonic() - started:.0f} s", flush=True)


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr)[-8000:]
        raise SystemExit(f"{said}\nattn: status {done.returncode} from: {' '.join(command)}\nATTN_CPP=0 leaves it out")


class BuildPy(build_py):
    """Adds attn/_build_info.py: to the wheel, or to the source tree of an editable install."""

    def run(self) -> None:
        super().run()
        write_info(ROOT / "attn" if self.editable_mode else Path(self.build_lib) / "attn")


class Wheel(bdist_wheel):
    """A wheel for every Python 3 of the platform, packed from an empty `build/lib`: pip builds in the source tree, so
    files of an earlier build would be packed."""

    def run(self) -> None:
        """Empties the folder that will be packed, then packs."""
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        if not INFO.get("cpu"):
            return "py3", "none", "any"
        machine = toolchain.find_compiler().machine.replace("aarch64", "arm64")  # one, where Python itself has both
        return "py3", "none", super().get_tag()[2].replace("universal2", machine)


os.chdir(ROOT)
INFO = decide() if BUILDS & set(sys.argv) else {}
SOURCES = sorted(path.as_posix() for path in Path("csrc/cpu").glob("*.cpp"))
setup(
    packages=packages(),
    package_dir=dict(MOVED),
    ext_modules=[Extension("attn._native_cpu", SOURCES)] if INFO.get("cpu") else [],
    cmdclass={"bdist_wheel": Wheel, "build_ext": Build, "build_py": BuildPy},
)
