"""What a wheel and an sdist contain, and that both import paths of the renamed folders work."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import attn

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"attn": "attn", "triton_kernels": "attn/triton_kernels", "benchmarks": "attn/benchmarks"}

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="the source tree is not here")


def build(what: str, source: Path, target: Path) -> Path:
    """A wheel or an sdist by the project's own build backend."""
    target.mkdir(parents=True, exist_ok=True)
    code = f"import sys, setuptools.build_meta as b; b.build_{what}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(target)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree in which an earlier build has left files behind."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    left_out = shutil.ignore_patterns(".*cache*", ".venv", ".git", ".benchmarks", "__pycache__", "build", "dist", "out")
    shutil.copytree(ROOT, copy, ignore=left_out)
    stale = copy / "build" / "lib" / "attn"
    stale.mkdir(parents=True)
    (stale / "stale.py").write_text("")
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
    assert packed == modules(source) | results | {"attn/py.typed"}
    assert wheel.name.endswith("-py3-none-any.whl")


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
    (torch,) = (line for line in requires if line.startswith("torch"))
    assert torch == "torch>=2.10"
    assert set(said.get_all("Provides-Extra") or []) == {"test", "bench", "dev"}


def test_changelog_has_this_version() -> None:
    assert f"## {attn.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_sdist_is_complete(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    for needed in ("csrc/README.md", "Makefile", ".ci/run", "tests/test_packaging.py", "examples", "docs", "README.md"):
        assert (unpacked / needed).exists(), needed
    assert not list(unpacked.rglob("*.so"))
    again = build("wheel", unpacked, tmp_path / "wheel")
    assert names(again) == names(wheel)


def test_wheel_works_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path)
    code = (
        "import attn, attn.triton_kernels as t, attn.benchmarks.overhead as o; "
        "print(attn.__path__, t.__file__, o.__file__)"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout
    assert done.stdout.count(str(tmp_path)) == 3


@pytest.mark.slow
def test_types_reach_a_user(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="pip install -e '.[dev]' runs this test")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path)
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
