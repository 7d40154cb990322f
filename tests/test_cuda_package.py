"""The CUDA library as it is built and packed: when a build stops, what the sources read, what the library holds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builds import ROOT, built, copy_of_sources
from test_binding import HEADER, symbols
from test_cuda_build import scripts, stand_in

from attn import cuda_toolchain, native, toolchain
from attn.cuda_toolchain import REQUIREMENT, Toolkit

CUDA = ROOT / "csrc" / "cuda"
LIBRARY = native.path("cuda")

needs_library = pytest.mark.skipif(
    shutil.which("nm") is None or not LIBRARY.is_file(), reason="no nm, or the CUDA library is not built here"
)
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="the source tree is not here")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_sources(tmp_path_factory.mktemp("source") / "tree")


def refused(source: Path, tmp_path: Path, **env: str) -> str:
    """What a build says that stops before anything is compiled."""
    done = built("wheel", source, tmp_path / "none", **env)
    said = done.stdout + done.stderr
    assert done.returncode != 0, said
    assert list((tmp_path / "none").iterdir()) == []
    return said


@scripts
@pytest.mark.parametrize("wish", ["auto", "1"])
def test_an_unfit_nvcc_stops_the_build(wish: str, source: Path, tmp_path: Path) -> None:
    old = stand_in(tmp_path / "cuda", "11.6.55")
    said = refused(source, tmp_path, ATTN_CUDA=wish, ATTN_CUDA_HOME=str(old))
    assert "nothing was compiled" in said
    assert "UNFIT   nvcc" in said
    assert "11.6.55 from ATTN_CUDA_HOME" in said
    assert "ATTN_CUDA=0 leaves the CUDA kernels out" in said


@scripts
def test_a_build_that_must_have_cuda_stops_without_nvcc(source: Path, tmp_path: Path) -> None:
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, "nvcc").exists())
    said = refused(source, tmp_path, ATTN_CUDA="1", PATH=path, ATTN_CUDA_HOME="", CUDA_HOME="", CUDA_PATH="")
    assert "nothing was compiled" in said
    assert "MISSING nvcc" in said or "MISSING C++ compiler" in said
    said = refused(source, tmp_path, ATTN_CUDA="pip", PATH=path)
    assert f"pip install '{REQUIREMENT}'" in said or "MISSING C++ compiler" in said


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"ATTN_CUDA": "yes"}, "ATTN_CUDA is 'yes'; it must be auto, 1, 0 or pip"),
        ({"ATTN_CPP": "0", "ATTN_CUDA": "1"}, "ATTN_CPP=0 leaves the CUDA kernels out too, and ATTN_CUDA=1 wants them"),
    ],
)
def test_switches_that_cannot_be_followed(env: dict[str, str], said: str, source: Path, tmp_path: Path) -> None:
    assert said in refused(source, tmp_path, **env)


def test_no_kernel_source_names_a_header_of_torch_or_python() -> None:
    """Such a header inside nvcc is where its mismatch with the host compiler shows, and costs minutes a file."""
    foreign = re.compile(r'#include [<"](torch|ATen|c10|pybind11|Python\.h)')
    read = [path for path in CUDA.rglob("*") if path.suffix in (".cu", ".cuh", ".h") and path.name != "torch_cuda.h"]
    assert [path.name for path in read if foreign.search(path.read_text())] == []
    assert [path.name for path in read if "torch_stable" in path.read_text()] == []
    assert CUDA / "launch.h" in read


def nvcc() -> Toolkit:
    found = cuda_toolchain.find_toolkit()
    if not isinstance(found, Toolkit):
        pytest.skip("no nvcc")
    return found


def test_headers_that_nvcc_reads(tmp_path: Path) -> None:
    """All kernel sources at once: only the preprocessor runs."""
    together = tmp_path / "all.cu"
    together.write_text("".join(f'#include "{path}"\n' for path in sorted(CUDA.rglob("*.cu"))))
    command = [nvcc().nvcc, "-std=c++17", "-M", str(together)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = re.findall(r"(?:\\ |\S)+", done.stdout.replace("\\\n", " ").partition(": ")[2])
    assert any(name.endswith("cuda/launch.h") for name in files)
    assert [name for name in files if re.search(r"torch|/ATen/|/c10/|pybind11|Python\.h", name)] == []


@needs_library
def test_the_library_needs_only_functions_that_are_declared() -> None:
    needed = {name for _, name in symbols(LIBRARY, "-D", "--undefined-only")}
    foreign = {name for name in needed if "torch" in name or "c10" in name or name.startswith("Py")}
    declared = {*toolchain.torch_functions(HEADER), *toolchain.torch_functions(CUDA / "torch_cuda.h")}
    assert foreign <= declared
    assert "aoti_torch_get_current_cuda_stream" in foreign
    assert not {name for name in needed if re.match("cu[A-Z]|cuda", name)}  # the runtime is inside, the driver is not


@needs_library
def test_the_library_exports_nothing_else() -> None:
    offered = {name for _, name in symbols(LIBRARY, "-D", "--defined-only")}
    ours = {name for name in offered if not name.startswith(("_ZNSt", "_ZNKSt", "_ZTVSt", "_ZTISt", "_ZTSSt"))}
    assert ours == {"attn_cuda_unusable", "attn_cuda_poison"}


@needs_library
@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_libraries_that_the_library_needs() -> None:
    said = subprocess.run(["readelf", "-d", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"Shared library: \[([^]]+)]", said)
    assert "libtorch.so" in needed
    assert [name for name in needed if "cuda" in name] == []


@needs_library
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="loads with symbols left open")
def test_the_library_registers_its_ops_for_cuda() -> None:
    """Also beside a torch without CUDA, where the one function that is not there is left open."""
    code = (
        "import ctypes, os, sys, torch\n"
        "from attn import native_cuda\n"
        "library = ctypes.CDLL(sys.argv[1], mode=os.RTLD_LAZY)\n"
        "library.attn_cuda_unusable.restype = ctypes.c_char_p\n"
        "for name in ('forward', 'weights', 'backward', 'decode'):\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'attn_cuda::{name}', 'CUDA')\n"
        "print(library.attn_cuda_unusable().decode())"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "ATTN_CUDA_EMULATED": ""}
    done = subprocess.run([sys.executable, "-c", code, str(LIBRARY)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if not torch.cuda.is_available():
        assert "driver 580 or newer" in done.stdout or "driver 525 or newer" in done.stdout


@needs_library
def test_the_library_holds_the_images_that_were_asked_for() -> None:
    tool = shutil.which("cuobjdump") or triton_tool("cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump")
    images = native.build_info()["cuda_images"]
    elf, ptx = (
        subprocess.run([tool, flag, str(LIBRARY)], capture_output=True, text=True, check=True).stdout
        for flag in ("--list-elf", "--list-ptx")
    )
    assert set(re.findall(r"\.sm_(\w+)\.cubin", elf)) == set(images["archs"])
    assert set(re.findall(r"\.sm_(\w+)\.ptx", ptx)) == {images["ptx"]} - {""}


def triton_tool(name: str) -> str | None:
    """A binary tool of CUDA that Triton's wheel carries."""
    try:
        import triton
    except ImportError:
        return None
    found = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return str(found) if found.is_file() else None


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_stranger_finds_nothing_newer_than_torch_2_10(kind: str) -> None:
    """By torch-abi-audit, which knows the symbols of every release."""
    audit = shutil.which("torch-abi-audit", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if audit is None or not native.path(kind).is_file():
        pytest.skip("torch-abi-audit is not installed, or the library is not built")
    done = subprocess.run([audit, "--check", "torch", str(native.path(kind))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2.10" in done.stdout


@needs_library
def test_the_library_can_be_opened_only_beside_torch() -> None:
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(LIBRARY)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "libtorch.so" in done.stderr


@pytest.mark.slow
@needs_library
def test_only_what_changed_is_compiled(source: Path, tmp_path: Path) -> None:
    nvcc()
    copy = tmp_path / "tree"
    shutil.copytree(source, copy)

    def lines() -> list[str]:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        env = os.environ | {"ATTN_CUDA": "1"}
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return [line.split(":")[1].strip() for line in done.stdout.splitlines() if line.startswith("attn: csrc")]

    lines()
    assert lines() == []
    (copy / "csrc/cuda/device.cu").touch()
    assert lines() == ["csrc/cuda/device.cu"]
