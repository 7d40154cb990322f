"""The AVX-512 and AMX kernels on a CPU without them: the same sources over SIMDe's emulation of the intrinsics, and
plain C++ for the tiles."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import native_copy
import pytest

from attn import native

EMULATED = ("amx", "avx512bf16", "avx512")
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
    """A copied tree whose library takes this CPU for one with AVX-512 and AMX."""
    tree = native_copy.copy_sources(tmp_path_factory.mktemp("emulated") / "tree")
    dispatch = tree / "csrc" / "cpu" / "dispatch.cpp"
    found = r"bool has_(avx512\w*|amx)\(\) \{.*?\n?\}\n"
    text, changed = re.subn(found, r"bool has_\1() { return has_avx2(); }\n", dispatch.read_text(), flags=re.DOTALL)
    assert changed == len(EMULATED)
    dispatch.write_text(text)
    # -mno-avx512f behind the flags of the set takes all of AVX-512 away again: what is not emulated does not compile.
    native_copy.build(tree, EMULATED, CXXFLAGS=f"-O1 -mno-avx512f -I{HEADERS}")
    return tree


def in_tree(tree: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(tree), "ATTN_EXPECT": "cpu"} | variables
    return subprocess.run([sys.executable, *command], cwd=tree, env=env, capture_output=True, text=True)


def test_the_tests_of_the_kernels(emulated: Path) -> None:
    """Those of this folder with the emulated library in place: on every set, or on the one with tiles."""
    # No question of speed: an emulation is not quick, and which set is the quicker one was not measured. Nor of
    # Linux's grant, for which an emulation does not ask.
    chosen = "not portable and not costs_less and not planner_takes_it and not tiles_are_asked_for"
    tests = [f"tests/test_{name}.py" for name in ("native", "native_threads", "cpu_backward")]
    done = in_tree(emulated, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-k", chosen, *tests, ATTN_CPU_ISA="amx")
    assert done.returncode == 0, done.stdout[-6000:]
    for isa in EMULATED:
        assert re.search(rf"::test_random_cases_\w+\[\d-{isa}\] PASSED", done.stdout), isa


SITUATIONS = """
from attn import native
from attn.testing import assert_case, matrix
import torch
for isa in ("amx", "avx512bf16", "avx512"):
    with native.use_isa(isa):
        for name in matrix.SITUATIONS:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                assert_case(matrix.situation(name, dtype), "cpu")
    print(isa, "done")
"""


def test_every_situation_of_the_matrix(emulated: Path) -> None:
    done = in_tree(emulated, "-c", SITUATIONS)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert done.stdout.split() == [word for isa in EMULATED for word in (isa, "done")]


DIFFERENT = """
import torch
from attn import native
from attn.backends import load
from attn.spec import Operands
found = []
for isa in ("amx", "avx512bf16", "avx512"):
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        x = Operands(*torch.randn(3, 1, 2, 70, 32).to(dtype))
        with native.use_isa(isa):
            found.append(load("cpu").forward(x)[0])
bf16, f16 = found[::2], found[1::2]
print(*(torch.equal(bf16[i], bf16[2]) for i in (0, 1)), *(torch.equal(f16[i], f16[2]) for i in (0, 1)))
"""


def test_bf16_takes_the_products_of_pairs_and_nothing_else_does(emulated: Path) -> None:
    """Probabilities rounded to bf16 show in the bits."""
    assert in_tree(emulated, "-c", DIFFERENT).stdout.split() == ["False", "False", "True", "True"]
