"""What a wheel and an sdist contain, and that both import paths of the renamed folders work."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.message import Message
from pathlib import Path

import pytest
import torch
from builds import ROOT, build, built, copy_of_sources, keep_objects

import attn
from attn import toolchain

FOLDERS = {"attn": "attn", "triton_kernels": "attn/triton_kernels", "benchmarks": "attn/benchmarks"}

COMPILES = toolchain.find_compiler() is not None
LIBRARY = "attn/_native_cpu.dll" if os.name == "nt" else "attn/_native_cpu.so"

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="the source tree is not here")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree in which an earlier build has left files behind."""
    copy = copy_of_sources(tmp_path_factory.mktemp("source") / "tree")
    stale = copy / "build" / "lib" / "attn"
    stale.mkdir(parents=True)
    (stale / "stale.py").write_text("")
    (stale / "_native_stale.so").write_bytes(b"")
    (copy / "attn" / "_native_stale.so").write_bytes(b"")
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return {name for name in file.namelist() if not name.endswith("/")}


def unpack(wheel: Path, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as file:
        file.extractall(target)
    return target


def python(code: str, beside: Path, **env: str) -> str:
    """What a program prints that imports what lies in a folder, and nothing of this source tree."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=beside,
        env=os.environ | {"PYTHONPATH": str(beside)} | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as file:
        (name,) = (n for n in file.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(file.read(name))


def modules(source: Path) -> set[str]:
    """Every module of a source tree by its path in a wheel."""
    found = set()
    for folder, home in FOLDERS.items():
        found |= {f"{home}/{path.relative_to(source / folder).as_posix()}" for path in (source / folder).rglob("*.py")}
    return found


def test_wheel_holds_every_module_and_nothing_else(wheel: Path, source: Path) -> None:
    packed = {name for name in names(wheel) if ".dist-info/" not in name}
    results = {f"attn/benchmarks/results/{path.name}" for path in (source / "benchmarks/results").glob("*.json")}
    made = {"attn/_build_info.py"} | ({LIBRARY} if COMPILES else set())
    assert packed == modules(source) | results | {"attn/py.typed"} | made


def test_wheel_is_for_every_python_of_the_platform(wheel: Path) -> None:
    tag = wheel.stem.split("-", 2)[2]
    assert tag.startswith("py3-none-")
    assert tag.endswith("-any") != COMPILES


def test_wheel_carries_the_licence(wheel: Path) -> None:
    assert any(name.endswith("licenses/LICENSE") for name in names(wheel))
    assert metadata(wheel)["License-Expression"] == "BSD-3-Clause"


def test_metadata(wheel: Path) -> None:
    said = metadata(wheel)
    assert said["Name"] == "attn-kernels"
    assert said["Version"] == attn.__version__
    assert said["Requires-Python"] == ">=3.10"
    requires = said.get_all("Requires-Dist") or []
    lean = sorted(re.split(r"[^a-z]", line)[0] for line in requires if "extra ==" not in line)
    assert lean == ["numpy", "torch", "triton"]
    (triton,) = (line for line in requires if line.startswith("triton"))
    assert 'sys_platform == "linux"' in triton
    (torch,) = (line for line in requires if line.startswith("torch>"))
    assert torch == "torch>=2.10"
    assert set(said.get_all("Provides-Extra") or []) == {"test", "bench", "examples", "dev", "docs"}


def test_changelog_has_this_version() -> None:
    assert f"## {attn.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_sdist_is_complete(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    for needed in (
        "csrc/README.md",
        "csrc/torch_stable.h",
        "csrc/build_backend.py",
        "csrc/cpu/bind_cpu.cpp",
        "csrc/cuda/bind_cuda.cpp",
        "csrc/cuda/launch.h",
        "Makefile",
        ".ci/run",
        "tests/test_packaging.py",
        "examples",
        "docs",
        "README.md",
    ):
        assert (unpacked / needed).exists(), needed
    assert not list(unpacked.rglob("*.so"))
    keep_objects(unpacked)
    again = build("wheel", unpacked, tmp_path / "wheel")
    assert names(again) == names(wheel)


def test_wheel_works_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    code = (
        "import attn, attn.triton_kernels as t, attn.benchmarks.overhead as o; "
        "print(attn.__path__, t.__file__, o.__file__)"
    )
    said = python(code, unpack(wheel, tmp_path))
    assert str(ROOT) not in said
    assert said.count(str(tmp_path)) == 3


RUNS = (
    "import torch, attn; from attn import native; q = torch.randn(3, 2, 2, 9, 8)\n"
    "print(native.path(), native.load(), attn.explain(*q).reasons['cpu'], sep='|')\n"
    "torch.testing.assert_close(attn.attention(*q, backend='cpu'), attn.attention(*q, backend='reference'))"
)
PURE = "import torch, attn; q = torch.randn(3, 2, 2, 9, 8); attn.attention(*q); print(attn.explain(*q).reasons['cpu'])"


@pytest.mark.skipif(not COMPILES, reason="no C++ compiler")
def test_library_of_the_wheel_works_in_another_environment(wheel: Path, tmp_path: Path) -> None:
    """A fresh environment that has the wheel, and the libraries of this one."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=os.name != "nt")
    binaries = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    (site,) = (tmp_path / "env").rglob("site-packages")
    unpack(wheel, site)
    (site / "libraries.pth").write_text(str(Path(torch.__file__).parent.parent))
    done = subprocess.run([binaries / "python", "-I", "-c", RUNS], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    where, problem, *_ = done.stdout.strip().split("|")
    assert Path(where) == site / LIBRARY
    assert problem == "None"


def test_pure_python_where_it_is_asked_for(source: Path, tmp_path: Path) -> None:
    pure = build("wheel", source, tmp_path / "pure", ATTN_CPP="0")
    assert pure.name.endswith("-py3-none-any.whl")
    assert not [name for name in names(pure) if name.endswith((".so", ".dll"))]
    said = python(PURE, unpack(pure, tmp_path))
    assert "it was built with ATTN_CPP=0" in said


def test_pure_python_without_a_compiler(source: Path, tmp_path: Path) -> None:
    pure = build("wheel", source, tmp_path / "pure", PATH=str(tmp_path), CXX="")
    assert pure.name.endswith("-py3-none-any.whl")
    assert "no C++ compiler was found" in python(PURE, unpack(pure, tmp_path))


def test_a_build_that_must_have_the_library_stops_with_the_cure(source: Path, tmp_path: Path) -> None:
    done = built("wheel", source, tmp_path / "none", PATH=str(tmp_path), CXX="", ATTN_CPP="1")
    assert done.returncode != 0
    assert "nothing was compiled" in done.stderr + done.stdout
    assert "cure: install g++" in done.stderr + done.stdout
    assert list((tmp_path / "none").iterdir()) == []


STAND_INS = {
    "old": ("echo '#define __GNUC__ 4'; echo '#define __GNUC_MINOR__ 8'; echo '#define __x86_64__ 1'", "need gcc 9"),
    "broken": (
        'case "$*" in *-dM*) echo "#define __GNUC__ 12";; *) echo "error: cmath: No such file" >&2; exit 1;; esac',
        "cmath: No such file",
    ),
}


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
@pytest.mark.parametrize("kind", STAND_INS)
def test_an_unfit_compiler_stops_the_build_with_the_cure(kind: str, source: Path, tmp_path: Path) -> None:
    script, message = STAND_INS[kind]
    stand_in = tmp_path / "c++"
    stand_in.write_text(f"#!/bin/sh\n{script}\n")
    stand_in.chmod(0o755)
    done = built("wheel", source, tmp_path / "none", CXX=str(stand_in))
    said = done.stderr + done.stdout
    assert done.returncode != 0
    assert "nothing was compiled" in said
    assert message in said
    assert "ATTN_CPP=0 installs without the C++ kernels" in said


def test_a_mistyped_switch_stops_the_build(source: Path, tmp_path: Path) -> None:
    done = built("wheel", source, tmp_path / "none", ATTN_CPP="yes")
    assert done.returncode != 0
    assert "ATTN_CPP is 'yes'; it must be auto, 1 or 0" in done.stderr + done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not COMPILES, reason="no C++ compiler")
def test_only_what_changed_is_compiled(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tree"
    shutil.copytree(source, copy)

    def lines() -> list[str]:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        env = os.environ | {"ATTN_CUDA": "0"}
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith("attn: csrc")]

    lines()
    assert lines() == []
    (copy / "csrc/cpu/bind_cpu.cpp").touch()
    assert [line.split(":")[1].strip() for line in lines()] == ["csrc/cpu/bind_cpu.cpp"]
    (copy / "csrc/bind_operands.h").touch()
    assert [line.split(":")[1].strip() for line in lines()] == ["csrc/cpu/bind_cpu.cpp"]


@pytest.mark.slow
@pytest.mark.skipif(not COMPILES, reason="no C++ compiler")
def test_sdist_builds_from_nothing(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert LIBRARY in names(build("wheel", unpacked, tmp_path / "wheel", ATTN_CPP="1"))


@pytest.mark.slow
def test_types_reach_a_user(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="pip install -e '.[dev]' runs this test")
    unpack(wheel, tmp_path)
    program = tmp_path / "user.py"
    program.write_text(
        "import torch, attn\n"
        "m, x = attn.MultiheadAttention(4, 2), torch.zeros(3, 4)\n"
        "reveal_type(m(x, x, x)[1])\n"
        "reveal_type(m(x, x, x, need_weights=False)[1])\n"
        "reveal_type(attn.masks.causal() & attn.masks.window(1, 0))\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), str(program)]
    env = os.environ | {"MYPYPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    revealed = re.findall(r'Revealed type is "(?:builtins\.)?([\w.]+)', done.stdout)
    assert revealed == ["torch._tensor.Tensor", "None", "attn.masks.Mask"], done.stdout + done.stderr


def test_source_tree_has_the_same_import_names(tmp_path: Path) -> None:
    code = (
        "import sys, attn.triton_kernels as t, attn.benchmarks as b; print(t.__file__); print(b.__file__); "
        "print('triton_kernels' in sys.modules or 'benchmarks' in sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels, benchmarks, twice = done.stdout.split("\n")[:3]
    assert Path(kernels) == ROOT / "triton_kernels" / "__init__.py"
    assert Path(benchmarks) == ROOT / "benchmarks" / "__init__.py"
    assert twice == "False"


def test_import_is_light(tmp_path: Path) -> None:
    code = "import sys, attn, attn.cli; attn.cli.parser(); print('torch' in sys.modules, 'numpy' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(Path(attn.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "False False", done.stderr


def test_nobody_imports_the_folders_by_their_top_level_names() -> None:
    wrong = re.compile(r"^\s*(from|import) (triton_kernels|benchmarks)\b", re.MULTILINE)
    found = [
        str(path.relative_to(ROOT))
        for folder in ("attn", "triton_kernels", "benchmarks", "tests", "examples")
        for path in (ROOT / folder).rglob("*.py")
        if wrong.search(path.read_text())
    ]
    assert found == []


def test_ci_script_ends_with_pytest() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) or os.name == "nt"
    last = script.read_text().rstrip().splitlines()[-1]
    assert last.startswith("exec ")
    assert "pytest" in last
