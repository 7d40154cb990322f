"""`attn.benchmarks.gpu_suite` without a GPU: in small in Triton's interpreter, and its parts with fakes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_timer import FakeTimer

from attn.benchmarks import gpu_suite, gpu_timing, harness, presets, sanitizer, timer, work
from attn.benchmarks.harness import Lineup, Who
from attn.benchmarks.peers import PEERS, Contender
from attn.benchmarks.work import Cost
from attn.testing import spy

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has no wheel here")


def suite(*args: str) -> subprocess.CompletedProcess[str]:
    """The suite in a process of its own, in the interpreter and without a GPU."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "attn.benchmarks.gpu_suite", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200, check=False)


@needs_triton
def test_in_small(tmp_path: Path) -> None:
    """What it would write for a GPU has the same form; figures are drawn from it, and `bench --compare` reads it."""
    out = tmp_path / "suite.json"
    done = suite("--small", "--json", str(out))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert found["machine"]["torch"] == torch.__version__
    assert found["backends"] == ["triton"]
    assert len(found["matrix"]) > 10
    assert all(cell["ok"] for cell in found["matrix"])
    assert {f["preset"] for f in found["results"]} == set(presets.PRESETS)
    assert {(f["kind"], f["what"]) for f in found["results"]} >= {
        *((kind, "both") for kind in ("attention", "varlen", "module", "layer")),
        *(("attention", what) for what in ("forward", "backward")),
        ("decode", "forward"),
    }
    for f in found["results"]:
        assert {r["contender"] for r in f["rows"] if r["ours"]} == {"attn triton"}, f["work"]
        assert all(r["p50_ms"] > 0 and r["error"] <= 1 for r in f["rows"] if not r["problem"]), f["work"]
    assert found["left_out"] == []
    assert found["proven"] == []
    assert found["sanitizer"] == "compute-sanitizer watches kernels on a GPU, and there is none"
    assert "attention backward" in done.stdout
    if importlib.util.find_spec("matplotlib") is not None:
        folder = tmp_path / "figures"
        assert gpu_suite.main(["--json", str(out), "--plot", str(folder)]) == 0
        drawn = {path.stem for path in folder.glob("*.png")}
        assert drawn == {"paper-forward", *presets.PRESETS} - {"paper"}


@needs_triton
def test_the_cases_that_the_sanitizer_watches() -> None:
    assert suite("--part", "cases", "--backend", "triton").returncode == 0


def test_it_goes_on_after_a_failure() -> None:
    run = gpu_suite.Suite("cuda", "triton", until=0.0, small=True)
    run.check("fails", torch.bfloat16, ("forward",), lambda: 1 // 0)
    run.check("passes", torch.bfloat16, ("backward",), lambda: None)
    assert [cell.ok for cell in run.cells] == [False, True]
    assert "ZeroDivisionError" in run.cells[0].error
    assert gpu_suite.proven(run) == ['("triton", "", torch.bfloat16, "backward"),']
    run.left_out = 1  # an entry stands for all cells
    assert gpu_suite.proven(run) == []


def test_a_matrix_without_time_says_what_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "special", lambda _: iter(()))
    run = gpu_suite.Suite("cpu", "reference", until=0.0, small=True)
    gpu_suite.check_all(run)
    assert run.cells == []
    assert run.left_out == len(gpu_suite.PASSES) * len(gpu_suite.DTYPES)


def test_without_a_backend_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_suite, "backends_here", lambda: ())
    assert gpu_suite.main([]) == 2
    assert "no backend for GPUs works here" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="the backend works here")
def test_a_backend_that_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--backend", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("backend cuda ")


def test_every_preset_is_timed_on_a_gpu_in_turns() -> None:
    planned = list(gpu_timing.works("cuda", small=False))
    assert sorted(str(w) for _, w in planned) == sorted(
        str(w) for make in presets.PRESETS.values() for w in make("cuda")
    )
    assert {name for name, _ in planned[: len(presets.PRESETS)]} == set(presets.PRESETS)
    first = next(w for name, w in planned if name == "paper")
    assert gpu_timing.LENGTHS[0] == first.L
    invited = [gpu_timing.peers_of(name, w) for name, w in planned]
    assert {peer for peers in invited for peer in peers} == set(PEERS)
    assert 4 <= sum("flex" in peers for peers in invited) <= 12


def test_variants_race_beside_their_originals() -> None:
    w = work.parse("attention backward cuda bfloat16 causal B=1 H=2 L=64 D=64")
    found = [
        Contender(n, lambda: torch.ones(1), ours=n.startswith("attn"))
        for n in ("attn cuda", "attn triton", "sdpa flash", "flex")
    ]
    ready = Lineup(found, {c.name: (lambda: lambda: None) for c in found}, lambda c: 0.0, Cost(1, 1), {})
    made = {c.name: c for c in gpu_timing.variants(w, ready)}
    names = {f"{c}, deterministic" for c in ("attn cuda", "attn triton", "sdpa flash")}
    assert set(made) == names | {"attn triton, one pass"}
    assert set(ready.runs) == set(made) | {c.name for c in found}
    with made["attn cuda, deterministic"].inside():
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert gpu_timing.variants(work.parse(str(w).replace("cuda", "cpu")), ready) == []


@needs_triton
def test_one_pass_is_an_option_for_a_while() -> None:
    config = importlib.import_module("attn.triton_kernels.config")
    before = config.ONE_PASS
    with gpu_timing.one_pass():
        assert config.ONE_PASS
    assert before == config.ONE_PASS


def test_a_work_that_cannot_be_set_up_is_a_result_too(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = [("quick", w) for w in presets.quick("cpu")][:2]
    monkeypatch.setattr(gpu_timing, "works", lambda *_: iter(planned))
    monkeypatch.setattr(timer, "timer_for", lambda _: FakeTimer())
    monkeypatch.setattr(gpu_timing, "timer_for", lambda _: FakeTimer())
    monkeypatch.setattr(harness, "lineup", lambda *_: 1 // 0)
    found = gpu_timing.timings(("reference",), "cpu", False, time.monotonic() + 100)
    assert [f["rows"] for f in found.results] == [[], []]
    assert "ZeroDivisionError" in found.results[0]["absent"]["everyone"]
    late = gpu_timing.timings(("reference",), "cpu", False, 0.0)
    assert late.left_out == [str(w) for _, w in planned]


def test_modules_run_on_the_backend_that_is_named() -> None:
    w = work.parse("module both cpu float32 full B=1 H=2 L=20 D=8")
    with spy() as calls:
        (result,) = harness.measure([w], FakeTimer(), 0.0, Who(("reference",)))  # type: ignore[arg-type]
    assert [r.contender for r in result.rows] == ["attn reference", "nn.MHA"]
    assert all(r.ms and not r.problem for r in result.rows)
    assert {backend for backend, _ in calls} == {"reference"}


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a script of that text on the path as compute-sanitizer."""
    if os.name == "nt":
        pytest.skip("the fake is a shell script")

    def write(text: str) -> None:
        path = tmp_path / sanitizer.TOOL
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return write


def test_the_sanitizer_watches_every_backend(tool: Callable[[str], None]) -> None:
    tool('echo "$@"; test -n "$PYTORCH_NO_CUDA_MEMORY_CACHING" || exit 3; test "$2" = memcheck || exit $4')
    found = sanitizer.run(("cuda", "triton"), time.monotonic() + 60)
    assert [(one.kind, one.backend, one.ok) for one in found] == [
        ("memcheck", "cuda", True),
        ("memcheck", "triton", True),
        ("racecheck", "cuda", False),
        ("racecheck", "triton", False),
    ]
    assert found[0].said.endswith("-m attn.benchmarks.gpu_suite --part cases --backend cuda")
    assert "--error-exitcode 9" in found[0].said


def test_a_sanitizer_that_does_not_end_is_no_failure(tool: Callable[[str], None]) -> None:
    tool("exec sleep 20")
    found = sanitizer.run(("triton",), time.monotonic() + 0.4)
    assert [one.ok for one in found] == [None, None]
    assert "not done after" in found[0].said
    assert sanitizer.run(("triton",), 0.0)[0].said == "no time was left"


@pytest.mark.parametrize(("ok", "status"), [(True, 0), (None, 0), (False, 1)])
def test_what_the_sanitizer_found_decides_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], ok: bool | None, status: int
) -> None:
    one = sanitizer.Sanitized("memcheck", "reference", ok, 1.0, "")
    monkeypatch.setattr(sanitizer, "missing", lambda: None)
    monkeypatch.setattr(sanitizer, "run", lambda *_: [one])
    command: list[Any] = ["--backend", "reference", "--part", "sanitizer", "--json", tmp_path / "out.json"]
    assert gpu_suite.main([str(word) for word in command]) == status
    assert "memcheck on reference" in capsys.readouterr().out
