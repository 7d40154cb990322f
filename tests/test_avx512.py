"""The AVX-512 kernels on a CPU without AVX-512: the same sources over SIMDe's emulation of the intrinsics."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import native_copy
import pytest

from attn import native

EMULATED = ("avx512bf16", "avx512")
HEADERS = Path(__file__).with_name("emulated_avx512")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(native_copy.CANNOT), reason=native_copy.CANNOT),
    pytest.mark.skipif("avx2" not in native.usable(), reason="the emulation is built of AVX2"),
    pytest.mark.skipif(
        not Path("/usr/include/simde/x86/avx512.h").is_file(), reason="SIMDe is not here (Debian: libsimde-dev)"
    ),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copied tree whose library takes this CPU for one with AVX-512."""
    tree = native_copy.copy_sources(tmp_path_factory.mktemp("emulated") / "tree")
    dispatch = tree / "csrc" / "cpu" / "dispatch.cpp"
    found = r"bool has_(avx512\w*)\(\) \{.*?\n?\}\n"
    text, changed = re.subn(found, r"bool has_\1() { return has_avx2(); }\n", dispatch.read_text(), flags=re.DOTALL)
    assert changed == len(EMULATED)
    dispatch.write_text(text)
    # -mno-avx512f behind the flags of the set takes all of AVX-512 away again: what is not emulated does not compile.
    native_copy.build(tree, EMULATED, CXXFLAGS=f"-O1 -mno-avx512f -I{HEADERS}")
    return tree


@pytest.mark.parametrize("isa", EMULATED)
def test_the_tests_of_the_kernels(isa: str, emulated: Path) -> None:
    """Those of this folder that force a set or take the one in use, with the emulated library in place."""
    env = os.environ | {"ATTN_CPU_ISA": isa, "PYTHONPATH": str(emulated), "ATTN_EXPECT": "cpu"}
    tests = ["tests/test_native.py", "tests/test_cpu_backward.py"]
    # A set whose speed was never measured is not taken to be the quicker one; the emulation is not.
    skip = "not costs_less and not planner_takes_it"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", skip, *tests]
    done = subprocess.run(command, cwd=emulated, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert f"[{isa}" in done.stdout or " passed" in done.stdout
