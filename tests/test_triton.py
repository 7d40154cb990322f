"""The Triton kernels without a GPU: in the interpreter, compiled offline, and what a call costs on the host.

Interpreting and compiling exclude each other in one process, so each of them has a process of its own here.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import attn
from attn.backends.triton import INTERPRETED
from attn.benchmarks import row_tables

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has no wheel here")


def python(*args: str, interpret: bool = False, timeout: int = 1200, **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the source tree, with `more` in its environment."""
    env = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "PYTHONPATH": str(ROOT), **more}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def interpreted(*args: str) -> str:
    """Run pytest on the folder of interpreter tests; returns its last line, and fails with its output."""
    done = python("-m", "pytest", "tests/interpreted", "-q", "-p", "no:cacheprovider", *args, interpret=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


@needs_triton
def test_the_kernels_in_the_interpreter() -> None:
    last = interpreted()
    passed = re.search(r"(\d+) passed", last)
    assert passed is not None
    assert int(passed[1]) > 100
    assert "skipped" not in last


@needs_triton
@pytest.mark.slow
def test_more_of_the_kernels_in_the_interpreter() -> None:
    assert "passed" in interpreted("-m", "slow")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("seeds", ["0:50", "50:100", "100:150", "150:200"])
def test_the_module_on_random_configurations(seeds: str) -> None:
    """The differential test against nn.MultiheadAttention, with this backend forced: about a second each."""
    test = ("-m", "pytest", "tests/test_module_differential.py", "-q", "-p", "no:cacheprovider")
    done = python(*test, interpret=True, ATTN_TEST_BACKEND="triton", ATTN_TEST_SEEDS=seeds)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    served = re.search(r"compared (\d+).*mismatches 0; served by triton (\d+)", done.stdout)
    assert served is not None
    assert min(int(served[1]), int(served[2])) >= 20


@needs_triton
def test_offline_compiles_spill_nothing_and_use_matrix_instructions() -> None:
    """Some kernels of each architecture; the whole table is `compile_table` itself, in docs/triton.md."""
    done = python("-m", "attn.benchmarks.compile_table", "--quick")
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {r["arch"] for r in rows} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert len(rows) > 25


def compile_table() -> ModuleType:
    return importlib.import_module("attn.benchmarks.compile_table")


@needs_triton
def test_the_committed_table_holds_what_it_must() -> None:
    """No spills where none may be, nothing that does not fit, tensor cores in every product: `faults`."""
    table = compile_table()
    rows = row_tables.load(table.Row, table.RESULTS).values()
    assert [what for row in rows for what in table.faults(row)] == []
    found = {(row.arch, row.dtype, row.head_dim, row.kernel) for row in rows}
    for arch in table.ARCHS:
        for head_dim in table.HEAD_DIMS:
            kernels = {"forward", "delta", "queries", *(("keys",) if head_dim <= 128 else ("dk", "dv"))}
            assert {(arch, "bfloat16", head_dim, kernel) for kernel in kernels} <= found, (arch, head_dim)
    assert {(r.arch, r.dtype, r.head_dim, r.features) for r in rows if table.gated(r) and r.dtype != "float16"} == {
        (arch, dtype, d, features)
        for dtype in ("bfloat16", "float32")
        for arch in ("sm_80", "sm_90", "sm_100")
        for d in (32, 64, 100, 128)
        for features in table.COMMON
    }
    training = [r for r in rows if r.arch == "sm_90" and r.kernel in ("forward", "keys", "dk", "dv", "queries")]
    counted = [r for r in training if r.dtype in ("bfloat16", "float16")]
    assert all(r.products["HGMMA"] >= r.dots["warp_group_dot"] >= r.dots["source"] >= 2 for r in counted)
    assert len(counted) > 40
    assert all(r.products for r in rows if r.dtype == "tf32" and r.dots["source"])
    assert {r.arch for r in rows if r.dtype == "tf32"} == set(table.ARCHS)


@needs_triton
def test_the_documents_show_the_committed_table() -> None:
    table = compile_table()
    assert table.markdown(row_tables.load(table.Row, table.RESULTS)) in (ROOT / "docs" / "triton.md").read_text()


def test_a_fault_of_a_kernel_is_seen() -> None:
    table = compile_table()
    row = table.Row(
        *("sm_90", "forward", "bfloat16", 64, "causal", "128x128 w8 s2", 128, 0, 1 << 16, True),
        *({"source": 2, "warp_group_dot": 2}, {"HGMMA": 12}, 66),
    )
    assert table.faults(row) == []
    wrong = (
        {"spills": 8},
        {"fits": False},
        {"dots": {"source": 2, "warp_group_dot": 1, "mma": 1}},
        {"dtype": "tf32", "dots": {"source": 2, "mma": 1, "fma": 1}},
        {"products": {}},
    )
    assert [len(table.faults(row._replace(**change))) for change in wrong] == [1] * 5
    assert table.risen(row._replace(head_dim=256, spills=9), {"": row}) == []
    assert table.risen(row._replace(spills=9), {row.key: row._replace(spills=8)}) != []
    assert table.risen(row, {row.key: row._replace(spills=8)}) == []


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("words", ["sm_90 bfloat16 128", "sm_80 bfloat16 64 causal", "gfx942 float16 64"])
def test_no_ceiling_of_the_committed_table_rises(words: str) -> None:
    done = python("-m", "attn.benchmarks.compile_table", "--check", words)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("registers") > 5


COST = """
import sys, time, torch
torch.set_num_threads(1)
from attn.benchmarks import compile_table
from attn.triton_kernels import passes
x = compile_table.operands(torch.bfloat16, 64, "causal")

def quickest(run):
    best = 1.0
    for _ in range(400):
        start = time.perf_counter()
        for _ in range(10):
            run()
        best = min(best, (time.perf_counter() - start) / 10)
    return best * 1e6

with compile_table.offline("sm_90") as driver:
    residuals = passes.forward(x)
    d_out = torch.zeros_like(residuals[0])
    forward = lambda: passes.forward(x)
    backward = lambda: passes.backward(x, residuals, d_out, None, None, False)
    backward()
    before = driver.launches
    f, b = quickest(forward), quickest(backward)
    assert driver.launches - before == 4000 * (1 + 3), driver.launches
baseline = quickest(lambda: torch.empty((2, 2, 256), dtype=torch.float32))
print(f, b, baseline)
"""


@needs_triton
def test_host_cost_of_a_cached_call() -> None:
    """With the launch stubbed out, in units of one `torch.empty`, so that a slow machine is no failure: a forward call
    is about 12 of them and a backward call 22 (1 to 1.3 microseconds each on a 2 GHz core: 16 and 30 in all)."""
    done = python("-c", COST)
    assert done.returncode == 0, done.stderr[-2000:]
    forward, backward, unit = map(float, done.stdout.split())
    assert forward < 25 * unit, done.stdout
    assert forward + backward < 70 * unit, done.stdout


VARIANTS = """
import torch
from attn.benchmarks import compile_table
from attn.spec import DecodeOperands, Operands
from attn.triton_kernels import backward, decode, forward, passes

KERNELS = (
    forward.attn_forward, backward.attn_delta, backward.attn_backward_keys, backward.attn_backward_queries,
    decode.attn_decode, decode.attn_combine,
)

def train(B, H, L, S, p, number):
    q, k, v = (torch.zeros(B, n, H, 64, dtype=torch.bfloat16).transpose(1, 2) for n in (L, S, S))
    seed = torch.zeros(2, dtype=torch.int64)
    x = Operands(q, k, v, scale=number, softcap=number, left=int(number), right=0, rng=seed, dropout_p=p)
    residuals = passes.forward(x)
    passes.backward(x, residuals, torch.zeros_like(residuals[0]), None, None, False)

def step(B, H, S):
    cache = torch.zeros(B, 1, S, 64, dtype=torch.bfloat16)
    lengths = torch.full((B,), S, dtype=torch.int32)
    passes.decode(DecodeOperands(torch.zeros(B, H, 1, 64, dtype=torch.bfloat16), cache, cache, lengths, scale=0.1))

with compile_table.offline("sm_90"):
    train(2, 2, 256, 256, 0.1, 16.0)
    train(1, 1, 17, 33, 0.5, 1.0)
    train(16, 16, 1, 1, 0.999, 7.5)
    train(3, 2, 32, 100, 0.3, 2.0)
    step(2, 16, 4096)
    step(2, 3, 4097)
    step(2, 1, 16000)
print([sum(len(found[0]) for found in kernel.device_caches.values()) for kernel in KERNELS])
"""


@needs_triton
def test_new_sizes_and_numbers_compile_nothing() -> None:
    done = python("-c", VARIANTS)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [1] * 6


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="Triton can run here")
def test_without_a_gpu_the_reason_names_the_cure() -> None:
    q = torch.zeros(1, 1, 2, 8)
    assert "triton" not in attn.available_backends()
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        attn.attention(q, q, q, backend="triton")


def test_importing_attn_does_not_import_triton() -> None:
    code = (
        "import sys, attn, torch; q = torch.zeros(1, 1, 2, 8); attn.attention(q, q, q); print('triton' in sys.modules)"
    )
    assert python("-c", code).stdout.strip() == "False"
