"""Where the packages come from, and the build of the compiled libraries; all else is in pyproject.toml.

Two folders of the repository are installed under another name:

    triton_kernels/  ->  attn.triton_kernels      (a top-level `triton_kernels` belongs to another project)
    benchmarks/      ->  attn.benchmarks          (so that benchmarks also run from a wheel)

`csrc/cpu/` becomes attn/_native_cpu.so and `csrc/cuda/` attn/_native_cuda.so, without torch and without Python's
headers: see csrc/README.md. Environment:

    ATTN_CPP=auto        build the first where a C++ compiler is found (the default); 1: fail without; 0: leave both out
    ATTN_CUDA=auto       build the second where nvcc is found too (the default); 1: fail without; 0: leave it out;
                         pip: with the pinned toolkit, which pip brings into the build's environment
    ATTN_CUDA_HOME       the toolkit to build with; else CUDA_HOME, CUDA_PATH, or the nvcc on the path
    ATTN_CUDA_ARCHS      GPU architectures, such as "80+PTX;90a;120"
    CXX, CXXFLAGS, LDFLAGS, MAX_JOBS, ATTN_COMPILER_LAUNCHER (such as ccache)
"""

import hashlib
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
LEAVES_OUT = "ATTN_CUDA=0 leaves the CUDA kernels out, ATTN_CPP=0 all that is compiled"
BUILDS = {"build", "build_py", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"}


sys.path.insert(0, str(ROOT))
from attn import cuda_toolchain, toolchain  # noqa: E402  (the package itself loads nothing before it is used)

sys.path.remove(str(ROOT))


def packages() -> list[str]:
    """Every package to install, by its installed name."""
    names = find_packages(str(ROOT), include=["attn", "attn.*"])
    for name, folder in MOVED.items():
        names += [name, *(f"{name}.{sub}" for sub in find_packages(str(ROOT / folder)))]
    return names


def decide() -> dict:
    """What will be built, as attn/_build_info.py will say; ends the build with a table where it cannot be right."""
    cpp, cuda = wish("ATTN_CPP", "auto", "1", "0"), wish("ATTN_CUDA", "auto", "1", "0", "pip")
    info = {"cpu": False, "why_no_cpu": "", "compiler": "", "sets": []}
    info |= {"cuda": False, "why_no_cuda": "", "nvcc": "", "cuda_images": {}}
    if cpp == "0":
        if cuda in ("1", "pip"):
            raise SystemExit(f"attn: ATTN_CPP=0 leaves the CUDA kernels out too, and ATTN_CUDA={cuda} wants them")
        why = "it was built with ATTN_CPP=0"
        return info | {"why_no_cpu": why, "why_no_cuda": why}
    compiler, rows = toolchain.find_compiler(), toolchain.check()
    toolkit, target = None, None
    if cuda == "0":
        info["why_no_cuda"] = "it was built with ATTN_CUDA=0"
    elif compiler is None:
        info["why_no_cuda"] = "no C++ compiler was found when it was built"
    else:
        cuda_rows, toolkit, target = cuda_toolchain.check(compiler, cuda, OBJECTS)
        rows += cuda_rows
    must = {"C++ compiler"} if cpp == "1" or cuda in ("1", "pip") else set()
    must |= {"nvcc"} if cuda in ("1", "pip") else set()
    bad = [row for row in rows if row.state == "unfit" or (row.state == "missing" and row.item in must)]
    if bad:
        raise SystemExit(f"attn: cannot build; nothing was compiled\n{toolchain.table(rows)}")
    print(toolchain.table(rows), flush=True)
    if compiler is None:
        return info | {"why_no_cpu": "no C++ compiler was found when it was built"}
    info |= {"cpu": True, "compiler": str(compiler), "sets": toolchain.available_sets(compiler)}
    if toolkit is not None:
        images = {"archs": list(target.archs), "ptx": target.ptx}
        info |= {"cuda": True, "nvcc": str(toolkit), "cuda_images": images}
    elif not info["why_no_cuda"]:
        info["why_no_cuda"] = "no nvcc was found when it was built"
    return info


def wish(name: str, *values: str) -> str:
    """An environment variable that has to be one of these; the first where it is not set."""
    value = os.environ.get(name) or values[0]
    if value not in values:
        raise SystemExit(f"attn: {name} is {value!r}; it must be {', '.join(values[:-1])} or {values[-1]}")
    return value


def write_info(folder: Path) -> None:
    """attn/_build_info.py: what `python -m attn info` says of this build. A library of an earlier build goes."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("cpu", "cuda"):
        if not INFO[kind]:
            for library in folder.glob(f"_native_{kind}.*"):
                library.unlink()
    (folder / "_build_info.py").write_text(f'"""Written by the build."""\n\nINFO = {INFO!r}\n')


class Build(build_ext):
    """Compiles and links without setuptools' flags: the libraries are no Python modules. Only what changed is
    compiled."""

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
        headers, libraries, jobs, toolkit = {"torch_cpu": Path("csrc/torch_stable.h")}, (), toolchain.jobs(), None
        if ext.name.endswith("_cuda"):
            toolkit = cuda_toolchain.find_toolkit(os.environ.get("ATTN_CUDA", "auto"))
            headers["torch_cuda"] = Path("csrc/cuda/torch_cuda.h")
            libraries, jobs = cuda_toolchain.link_libraries(toolkit), cuda_toolchain.jobs()
        scratch = OBJECTS / f"{sys.platform}-{compiler.machine}"
        scratch.mkdir(parents=True, exist_ok=True)
        work = []
        for source in map(Path, ext.sources):
            target = scratch / (source.as_posix().replace("/", "_") + ".o")
            if source.suffix == ".cu":
                images = cuda_toolchain.Target(**INFO["cuda_images"])
                command = cuda_toolchain.compile_command(toolkit, compiler, source, target, images)
            elif (flags := toolchain.flags_of(source, compiler, INFO["sets"])) is not None:
                command = toolchain.compile_command(compiler, source, target, flags)
            else:
                continue
            work.append((source, target, command))
        stale = [job for job in work if changed(*job[1:])]
        print(f"attn: {ext.name}: {len(stale)} of {len(work)} files to compile", flush=True)
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda job: compile_one(*job), stale))
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        for command in toolchain.link_commands(compiler, [o for _, o, _ in work], library, headers, libraries):
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
    said = run(command)
    Path(f"{target}.log").write_text(said)  # benchmarks/cuda_sass.py reads the remarks in it
    stamp.write_text(key)
    print(f"attn: {source.as_posix()}: {time.monotonic() - started:.0f} s", flush=True)


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr)[-8000:]
        raise SystemExit(f"{said}\nattn: status {done.returncode} from: {' '.join(command)}\n{LEAVES_OUT}")
    return done.stdout + done.stderr


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
SOURCES = {
    "cpu": sorted(path.as_posix() for path in Path("csrc/cpu").glob("*.cpp")),
    "cuda": sorted(path.as_posix() for end in ("cpp", "cu") for path in Path("csrc/cuda").rglob(f"*.{end}")),
}
setup(
    packages=packages(),
    package_dir=dict(MOVED),
    ext_modules=[Extension(f"attn._native_{kind}", SOURCES[kind]) for kind in SOURCES if INFO.get(kind)],
    cmdclass={"bdist_wheel": Wheel, "build_ext": Build, "build_py": BuildPy},
)
