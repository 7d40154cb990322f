"""The compiled library under the address and undefined-behaviour sanitizers, on every instruction set of this CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import native_copy
import pytest

from attn import native

FLAGS = (
    "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all "
    "-fno-sanitize=null,alignment,object-size,pointer-overflow,vptr"  # minutes more, and the first sanitizer sees most
)

PLANTED = """
#include <cstdint>
extern "C" __attribute__((visibility("default"))) int attn_cpu_planted(int which) {
  volatile int n = which ? 3 : INT32_MAX;
  if (!which) return n + 1;
  int* volatile three = new int[3]{};  // volatile: the compiler is not to know its size
  const int beyond = three[n];
  delete[] three;
  return beyond;
}
"""
RUN = """
from attn import native
from attn.testing import assert_case, cases
assert native.load() is None, native.load()
drawn = cases(80, 83, ops=("attention", "varlen", "decode"), sizes=(1, 2, 3, 17, 33, 63, 65))
drawn += cases(6, 89, ops=("attention", "varlen", "decode"), sizes=(130, 257))
for isa in native.usable():
    with native.use_isa(isa):
        for case in drawn:
            assert_case(case, "cpu")
print(len(drawn), "cases on", *native.usable())
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(native_copy.CANNOT), reason=native_copy.CANNOT)]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, built with the sanitizers and with two planted faults that prove them at work."""
    copy = native_copy.copy_sources(tmp_path_factory.mktemp("sanitized") / "tree")
    (copy / "csrc" / "cpu" / "planted.cpp").write_text(PLANTED)
    sets = [name for name in native.usable() if name != "portable"]
    native_copy.build(copy, sets, CXXFLAGS=FLAGS, LDFLAGS="-fsanitize=address,undefined")
    return copy


def run(code: str, tree: Path) -> subprocess.CompletedProcess[str]:
    assert native_copy.COMPILER is not None
    libraries = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):  # Python itself was built without them
        command = [*native_copy.COMPILER.command, f"-print-file-name={name}"]
        libraries.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    env = os.environ | {
        "PYTHONPATH": str(tree),
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep what they have to the end
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run([sys.executable, "-c", code], cwd=tree, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(("which", "report"), [(0, "signed integer overflow"), (1, "heap-buffer-overflow")])
def test_the_sanitizers_are_at_work(which: int, report: str, sanitized: Path) -> None:
    code = f"import ctypes; from attn import native; ctypes.CDLL(str(native.path())).attn_cpu_planted({which})"
    done = run(code, sanitized)
    assert done.returncode != 0
    assert report in done.stderr


def test_cases_of_every_kind_are_clean(sanitized: Path) -> None:
    done = run(RUN, sanitized)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "cases on" in done.stdout
