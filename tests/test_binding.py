"""The declarations of torch's C interface against torch's own headers, and what the built library needs and offers."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from attn import native, toolchain

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "csrc" / "torch_stable.h"
OBJECTS = ROOT / "build" / "objects"
TORCH_2_10 = "0x020a000000000000"
COMPILER = toolchain.find_compiler()

needs_compiler = pytest.mark.skipif(
    COMPILER is None or COMPILER.kind == "msvc" or not HEADER.is_file(), reason="no C++ compiler, or no sources"
)
needs_nm = pytest.mark.skipif(shutil.which("nm") is None or not native.path().is_file(), reason="no nm, or no library")


def compiled(ours: Path, tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """torch's header and ours in one source."""
    assert COMPILER is not None
    source = tmp_path / "both.cpp"
    source.write_text(f'#include <torch/csrc/stable/c/shim.h>\n#include "{ours}"\n')
    include = Path(torch.__file__).parent / "include"
    command = [*COMPILER.command, "-std=c++17", *flags, "-I", str(include), str(source)]
    return subprocess.run(command, capture_output=True, text=True)


@needs_compiler
def test_declarations_are_torchs(tmp_path: Path) -> None:
    done = compiled(HEADER, tmp_path, "-fsyntax-only")
    assert done.returncode == 0, done.stderr


@needs_compiler
def test_a_wrong_declaration_is_noticed(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.h"
    text = HEADER.read_text()
    spoilt = text.replace(
        "aoti_torch_get_dim(AtenTensorOpaque*, int64_t*)", "aoti_torch_get_dim(AtenTensorOpaque*, int*)"
    )
    assert spoilt != text
    wrong.write_text(spoilt)
    assert compiled(wrong, tmp_path, "-fsyntax-only").returncode != 0


@needs_compiler
def test_every_function_is_in_torch_2_10(tmp_path: Path) -> None:
    used = toolchain.torch_functions(HEADER)
    assert len(used) == len(set(re.findall(r"\b(?:aoti_torch|torch)_\w+(?=\()", HEADER.read_text())))
    empty = tmp_path / "empty.h"
    empty.write_text("")
    done = compiled(empty, tmp_path, "-E", f"-DTORCH_TARGET_VERSION={TORCH_2_10}")
    assert done.returncode == 0, done.stderr
    missing = [name for name in used if not re.search(rf"\b{name}\(", done.stdout)]
    assert missing == []
    assert "torch_stream_native_handle(" not in done.stdout  # it came with 2.13: newer ones are really left out


def symbols(path: Path, *flags: str) -> set[tuple[str, str]]:
    """(kind, name) by nm."""
    lines = subprocess.run(["nm", *flags, str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
    return {(words[-2], words[-1]) for words in map(str.split, lines) if len(words) >= 2}


@needs_nm
def test_the_library_needs_only_those_functions() -> None:
    needed = {name for _, name in symbols(native.path(), "-D", "--undefined-only")}
    foreign = {name for name in needed if "torch" in name or "c10" in name or name.startswith("Py")}
    assert foreign <= set(toolchain.torch_functions(HEADER))
    assert foreign >= {"torch_library_impl", "torch_parallel_for"}


@needs_nm
def test_the_library_exports_nothing_else() -> None:
    offered = {name for _, name in symbols(native.path(), "-D", "--defined-only")}
    ours = {name for name in offered if not name.startswith(("_ZNSt", "_ZNKSt", "_ZTVSt", "_ZTISt", "_ZTSSt"))}
    assert ours >= {"attn_cpu_select", "attn_cpu_poison"}
    assert all(name.startswith("attn_cpu_") for name in ours)


@needs_nm
def test_no_function_is_shared_between_instruction_sets() -> None:
    """The linker keeps one copy of an inline function, and it may be one that another CPU cannot run."""
    objects = sorted(OBJECTS.glob("*/*.o"))
    if not objects:
        pytest.skip("the library was not built in this tree")
    weak = {path: {name for kind, name in symbols(path) if kind in "WVu"} for path in objects}
    for path, names in weak.items():
        if path.name.removesuffix(".cpp.o").rpartition("_")[2] in toolchain.SETS:
            others = set().union(*(found for other, found in weak.items() if other != path))
            assert not names & others, f"{path.name} shares {sorted(names & others)[:3]}"


def test_the_table_of_checks_names_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "find_compiler", lambda: None)
    (row,) = toolchain.check()
    assert row.state == "missing"
    assert "cure: " in toolchain.table([row])


@pytest.mark.parametrize(("kind", "version", "state"), [("gcc", (8, 5), "unfit"), ("clang", (9, 0), "unfit")])
def test_old_compilers_are_unfit(
    kind: str, version: tuple[int, int], state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = toolchain.Compiler(kind, version, ("c++",), "x86_64")
    monkeypatch.setattr(toolchain, "find_compiler", lambda: old)
    (row,) = toolchain.check()
    assert row.state == state
    assert "ATTN_CPP=0" in row.cure


def test_banner_of_msvc(monkeypatch: pytest.MonkeyPatch) -> None:
    banner = "Microsoft (R) C/C++ Optimizing Compiler Version 19.44.35207.1 for x64\n"
    monkeypatch.setattr(toolchain, "says", lambda command: banner)
    found = toolchain._msvc()
    assert found == toolchain.Compiler("msvc", (19, 44), ("cl",), "x86_64")


def test_sources_of_a_set_get_its_flags_and_no_others() -> None:
    gcc = toolchain.Compiler("gcc", (12, 2), ("c++",), "x86_64")
    plain = toolchain.flags_of(Path("csrc/cpu/bind_cpu.cpp"), gcc, ["avx2"])
    assert plain == ("-DATTN_HAVE_AVX2",)
    vectors = toolchain.flags_of(Path("csrc/cpu/isa_avx2.cpp"), gcc, ["avx2"])
    assert vectors is not None
    assert {"-mavx2", "-mfma"} <= set(vectors)
    assert toolchain.flags_of(Path("csrc/cpu/isa_avx512.cpp"), gcc, ["avx2"]) is None


def test_an_assembler_without_tiles_costs_that_set_alone(tmp_path: Path) -> None:
    """A compiler that has its intrinsics may stand beside an older assembler."""
    compiler = toolchain.find_compiler()
    if compiler is None or compiler.kind != "gcc" or "amx" not in toolchain.available_sets(compiler):
        pytest.skip("needs gcc and an assembler with AMX")
    assembler = tmp_path / "as"
    real = shlex.quote(str(shutil.which("as")))
    assembler.write_text(
        f'#!/bin/sh\nfor file; do :; done\nif grep -q tilerelease "$file"; then\n'
        f"  echo 'Error: no such instruction: tilerelease' >&2\n  exit 1\nfi\nexec {real} \"$@\"\n"
    )
    assembler.chmod(0o755)
    older = dataclasses.replace(compiler, command=(*compiler.command, f"-B{tmp_path}/"))
    expected = [name for name in toolchain.available_sets(compiler) if name != "amx"]
    assert toolchain.available_sets(older) == expected
