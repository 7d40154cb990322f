"""The checks before a CUDA build, with stand-ins for compilers, and the rules by which it compiles and links."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builds import ROOT

from attn import cuda_toolchain, native, native_cuda, toolchain
from attn.backends import load
from attn.cuda_toolchain import ARCHS, REQUIREMENT, Target, Toolkit, target_of
from attn.spec import AttentionSpec
from attn.toolchain import Compiler, Row

GCC = Compiler("gcc", (12, 2), ("c++",), "x86_64")
MSVC = Compiler("msvc", (19, 44), ("cl",), "x86_64")
LIMITS = (  # of CUDA 13.0
    "#if __GNUC__ > 15\n#error\n#endif\n#if (__clang_major__ >= 21) || (__clang_major__ < 3)\n#error\n#endif\n"
    "#if _MSC_VER < 1920 || _MSC_VER >= 1950\n#error\n#endif\n"
)

scripts = pytest.mark.skipif(os.name == "nt", reason="the stand-ins are shell scripts")
sources = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="the source tree is not here")


def stand_in(home: Path, version: str = "13.0.88", compiles: str = "exit 0") -> Path:
    """A folder that looks like a toolkit, with an nvcc that tells a version and does as it is told when it compiles."""
    release = ".".join(version.split(".")[:2])
    for folder in ("bin", "include/crt", "lib"):
        (home / folder).mkdir(parents=True)
    (home / "include/crt/host_config.h").write_text(LIMITS)
    (home / "lib/libcudart_static.a").write_text("")
    nvcc = home / "bin/nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *--version*) echo "Cuda compilation tools, release {release}, V{version}"; exit 0;;\n'
        f'*--dryrun*) echo "#$ TOP={home}" >&2; exit 0;; esac\n'
        f"{compiles}\n"
    )
    nvcc.chmod(0o755)
    return home


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No toolkit but what a test names; a shell, and nothing else, on the path."""
    for name in ("ATTN_CUDA_HOME", "CUDA_HOME", "CUDA_PATH", "ATTN_CUDA_ARCHS", "ATTN_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


def checked(tmp_path: Path, compiler: Compiler = GCC, wish: str = "auto") -> dict[str, Row]:
    rows, _, _ = cuda_toolchain.check(compiler, wish, tmp_path / "objects")
    for row in rows:
        assert row.state in ("ok", "missing", "unfit")
        assert row.state == "ok" or row.cure
    return {row.item: row for row in rows}


@pytest.mark.parametrize(
    ("text", "target"),
    [
        (ARCHS, Target(("80", "90a", "120"), "80")),
        ("80;90a;120", Target(("80", "90a", "120"))),
        ("86, 100f+PTX", Target(("86", "100f"), "100f")),
        ("8.0", None),
        ("80;", None),
        ("sm_80", None),
        ("80+ptx", None),
    ],
)
def test_lists_of_architectures(text: str, target: Target | None) -> None:
    assert target_of(text) == target


def test_flags_of_the_default_architectures() -> None:
    target = target_of(ARCHS)
    assert target is not None
    assert target.flags() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_80,code=compute_80",
    ]


DEFAULT: dict[str, Any] = {"archs": ["80", "90a", "120"], "ptx": "80"}


@pytest.mark.parametrize(
    ("built_for", "runs", "does_not"),
    [
        (DEFAULT, (80, 86, 87, 89, 90, 100, 103, 110, 120, 121), (75,)),
        ({"archs": ["90a"], "ptx": ""}, (90,), (80, 100)),
        ({"archs": ["86"], "ptx": ""}, (86, 89), (80, 90)),
        ({"archs": ["90"], "ptx": "90"}, (90, 100, 120), (80, 89)),
    ],
)
def test_which_gpus_a_build_runs_on(
    built_for: dict[str, Any], runs: tuple[int, ...], does_not: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = load("cuda")
    monkeypatch.setattr(backend, "missing", None)
    monkeypatch.setattr(native_cuda, "images", lambda: built_for)
    able = dataclasses.replace(backend.capability, devices=frozenset({"cuda"}))
    monkeypatch.setattr(type(backend), "capability", able)
    for arch in (*runs, *does_not):
        assert native_cuda.runs_on(arch, built_for) == (arch in runs)
        spec = AttentionSpec(device="cuda", dtype=torch.bfloat16, arch=f"sm_{arch}", head_dim=64, value_dim=64)
        said = backend.why_not(spec)
        if arch in runs:
            assert said is None
        else:
            assert said is not None
            assert f"not {'for ' if arch >= 80 else ''}sm_{arch}" in said


def test_without_nvcc_there_is_nothing_to_build_and_a_cure(tmp_path: Path) -> None:
    rows = checked(tmp_path)
    assert list(rows) == ["nvcc"]
    assert rows["nvcc"].state == "missing"
    assert "ATTN_CUDA=pip" in rows["nvcc"].cure


def test_asking_for_the_pip_toolkit_names_its_requirement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    row = checked(tmp_path, wish="pip")["nvcc"]
    assert row.state == "unfit"
    assert f"pip install '{REQUIREMENT}'" in row.cure


@scripts
@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("11.6.55", False),
        ("12.7.33", False),
        ("12.8.61", True),
        ("13.0.88", True),
        ("13.5.12", True),
        ("14.0.1", False),
    ],
)
def test_versions_of_nvcc(version: str, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_CUDA_HOME", str(stand_in(tmp_path / "cuda", version)))
    rows = checked(tmp_path)
    assert version in rows["nvcc"].found
    if fits:
        assert {row.state for row in rows.values()} == {"ok"}
        assert rows["a first kernel"].found == "compiles"
        assert ("untested" in rows["nvcc"].found) == (not version.startswith("13.0."))
    else:
        assert list(rows) == ["nvcc"]
        assert rows["nvcc"].state == "unfit"
        assert "ATTN_CUDA=pip" in rows["nvcc"].cure
        assert "ATTN_CUDA=0" in rows["nvcc"].cure


@scripts
def test_where_nvcc_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    homes = {name: stand_in(tmp_path / name, f"13.0.{i}") for i, name in enumerate(("a", "b", "c", "d"))}
    order = (("PATH", homes["a"] / "bin"), ("CUDA_PATH", homes["b"]), ("CUDA_HOME", homes["c"]))
    for name, folder in (*order, ("ATTN_CUDA_HOME", homes["d"])):
        monkeypatch.setenv(name, str(folder))
        found = cuda_toolchain.find_toolkit()
        assert isinstance(found, Toolkit)
        assert found.source == name
    monkeypatch.delenv("ATTN_CUDA_HOME")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "has no nvcc"))  # as images with the runtime alone have it
    found = cuda_toolchain.find_toolkit()
    assert isinstance(found, Toolkit)
    assert found.source == "CUDA_PATH"


@scripts
def test_a_named_toolkit_has_to_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_CUDA_HOME", str(tmp_path / "nowhere"))
    row = checked(tmp_path)["nvcc"]
    assert row.state == "unfit"
    assert "is not there" in row.found
    home = stand_in(tmp_path / "cuda")
    (home / "bin/nvcc").write_text('#!/bin/sh\nexec /gone/bin/nvcc "$@"\n')
    monkeypatch.setenv("ATTN_CUDA_HOME", str(home))
    row = checked(tmp_path)["nvcc"]
    assert row.state == "unfit"
    assert "does not tell its version" in row.found


@scripts
def test_an_nvcc_that_calls_another_leads_to_its_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = stand_in(tmp_path / "cuda")
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent))
    found = cuda_toolchain.find_toolkit()
    assert isinstance(found, Toolkit)
    assert found.root == home.resolve()
    assert cuda_toolchain.runtime(found) == home.resolve() / "lib/libcudart_static.a"


@scripts
@pytest.mark.parametrize(
    ("kind", "version", "fits"),
    [
        ("gcc", (8, 5), False),
        ("gcc", (9, 1), True),
        ("gcc", (15, 2), True),
        ("gcc", (16, 1), False),
        ("clang", (20, 1), True),
        ("clang", (21, 1), False),
        ("msvc", (19, 29), False),
        ("msvc", (19, 30), True),
        ("msvc", (19, 49), True),
        ("msvc", (19, 50), False),
    ],
)
def test_compilers_that_nvcc_takes(
    kind: str, version: tuple[int, int], fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTN_CUDA_HOME", str(stand_in(tmp_path / "cuda")))
    row = checked(tmp_path, Compiler(kind, version, ("c++",), "x86_64"))["nvcc's compiler"]
    assert (row.state == "ok") == fits
    if version == (16, 1):
        assert "CXX=g++-15" in row.cure


@scripts
@pytest.mark.parametrize("text", ["8.0", "80 90a 12.0", "75", "sm_90"])
def test_mistyped_architectures(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_CUDA_HOME", str(stand_in(tmp_path / "cuda")))
    monkeypatch.setenv("ATTN_CUDA_ARCHS", text)
    rows = checked(tmp_path)
    assert rows["architectures"].state == "unfit"
    assert text in rows["architectures"].found
    assert ARCHS in rows["architectures"].cure
    assert "a first kernel" not in rows  # it would fail for the reason that is named already


@scripts
def test_parts_of_different_releases_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "ptxas /tmp/x.ptx, line 9; fatal   : Unsupported .version 9.5; current version is '9.0'"
    monkeypatch.setenv("ATTN_CUDA_HOME", str(stand_in(tmp_path / "cuda", compiles=f'echo "{said}" >&2; exit 1')))
    row = checked(tmp_path)["a first kernel"]
    assert row.state == "unfit"
    assert "Unsupported .version 9.5" in row.found


@scripts
def test_pip_packages_of_different_releases_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    stand_in(site / "nvidia" / "cu13")
    monkeypatch.setattr(sys, "path", [str(site)])
    for name, version in {**cuda_toolchain.PARTS, "nvidia-nvvm": "13.5.21"}.items():
        about = site / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    row = checked(tmp_path, wish="pip")["pip packages"]
    assert row.state == "unfit"
    assert row.found == "nvidia-nvvm 13.5.21"
    about = site / "nvidia_nvvm-13.5.21.dist-info" / "METADATA"
    about.write_text(about.read_text().replace("13.5.21", "13.0.88"))
    assert checked(tmp_path, wish="pip")["pip packages"].state == "ok"


@scripts
def test_too_little_room_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_CUDA_HOME", str(stand_in(tmp_path / "cuda")))
    monkeypatch.setattr(toolchain, "free_memory", lambda: 1 << 29)
    rows = checked(tmp_path)
    assert rows["memory"].state == "unfit"
    assert rows["memory"].found == "0.5 GiB"
    monkeypatch.setattr(toolchain, "free_memory", lambda: None)  # where the system does not say
    assert "memory" not in checked(tmp_path)
    monkeypatch.setattr(cuda_toolchain, "DISK", 1 << 60)
    assert checked(tmp_path)["disk"].state == "unfit"


@scripts
def test_a_toolkit_without_its_static_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = stand_in(tmp_path / "cuda")
    (home / "lib/libcudart_static.a").unlink()
    monkeypatch.setenv("ATTN_CUDA_HOME", str(home))
    assert checked(tmp_path)["CUDA runtime"].state == "unfit"
    (home / "targets/x86_64-linux/lib").mkdir(parents=True)
    (home / "targets/x86_64-linux/lib/libcudart_static.a").write_text("")
    assert "CUDA runtime" not in checked(tmp_path)


def test_as_many_compilers_as_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "jobs", lambda: 8)
    for gib, jobs in ((1, 1), (5, 2), (64, 8)):
        monkeypatch.setattr(toolchain, "free_memory", lambda gib=gib: gib << 30)
        assert cuda_toolchain.jobs() == jobs


TOOLKIT = Toolkit("nvcc", (13, 0), "13.0.88", Path("toolkit"), "PATH")


def test_commands_for_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = cuda_toolchain.compile_command(TOOLKIT, MSVC, Path("a.cu"), Path("a.o"), Target(("80",)))
    assert "/EHsc,/MD,/utf-8" in command
    assert "-fPIC" not in " ".join(command)
    monkeypatch.setattr(cuda_toolchain, "WINDOWS", True)
    library = tmp_path / "lib/x64/cudart_static.lib"
    library.parent.mkdir(parents=True)
    library.write_text("")
    libraries = cuda_toolchain.link_libraries(Toolkit("nvcc", (13, 0), "13.0.88", tmp_path, "PATH"))
    assert libraries == (str(library),)
    headers = {"torch_cpu": ROOT / "csrc/torch_stable.h", "torch_cuda": ROOT / "csrc/cuda/torch_cuda.h"}
    *imports, link = toolchain.link_commands(MSVC, [tmp_path / "a.o"], tmp_path / "a.dll", headers, libraries)
    assert [command[0] for command in imports] == ["lib", "lib"]
    assert {str(tmp_path / "torch_cpu.lib"), str(tmp_path / "torch_cuda.lib"), str(library)} <= set(link)
    exports = (tmp_path / "torch_cuda.def").read_text().split()
    assert exports == ["LIBRARY", "torch_cuda.dll", "EXPORTS", "aoti_torch_get_current_cuda_stream"]
    assert "torch_library_impl" in (tmp_path / "torch_cpu.def").read_text()


def test_the_drivers_library_is_never_linked(tmp_path: Path) -> None:
    stand = tmp_path / "lib64/libcudart_static.a"
    stand.parent.mkdir()
    stand.write_text("")
    assert "-lcuda" not in cuda_toolchain.link_libraries(Toolkit("nvcc", (13, 0), "13.0.88", tmp_path, "PATH"))


@sources
def test_the_backend_brings_the_toolkit_only_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "setup.py").write_text("from setuptools import setup\nsetup(name='x')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "csrc"))
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    import build_backend  # type: ignore[import-not-found]

    for wish in ("auto", "1", "0", "pip"):
        monkeypatch.setenv("ATTN_CUDA", wish)
        assert (REQUIREMENT in build_backend.get_requires_for_build_wheel()) == (wish == "pip")
        assert (REQUIREMENT in build_backend.get_requires_for_build_editable()) == (wish == "pip")
        assert REQUIREMENT not in build_backend.get_requires_for_build_sdist()
    assert callable(build_backend.build_wheel)


@pytest.mark.parametrize(
    ("emulated", "cuda", "said"),
    [
        ("", None, "this build of torch has no CUDA"),
        ("", "13.0", "its library is not here: nvcc was away"),
        ("nowhere.so", None, "ATTN_CUDA_EMULATED is nowhere.so, where no file is"),
    ],
)
def test_why_the_library_is_not_loaded(
    emulated: str, cuda: str | None, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native_cuda, "EMULATED", emulated)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(native, "path", lambda kind="cpu": tmp_path / kind)
    monkeypatch.setattr(native, "build_info", lambda: {"why_no_cuda": "nvcc was away"})
    assert said in str(native_cuda.load.__wrapped__())
