"""The commands: what they print, when they fail, and that `info` also runs where torch does not."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attn
from attn.benchmarks import overhead
from attn.cli import COMMANDS, main
from attn.cli.demo import models, train
from attn.cli.progress import progress
from attn.cli.table import table

TINY = models.Size(steps=5, seconds=60, width=16, heads=2, layers=1, batch=2, length=32)
LINE = "attention cpu float32 head_dim=64 value_dim=64 band=start causal grad"


def shell(*arguments: str, beside: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m attn` in a new process; modules in `beside` go before the installed ones."""
    paths = [str(beside)] if beside else []
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, str(Path(attn.__file__).parent.parent)])}
    command = [sys.executable, "-m", "attn", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, cwd=beside)


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ([], ["nothing"], ["demo", "--fast"]):
        with pytest.raises(SystemExit) as stopped:
            main(wrong)
        assert stopped.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)


def test_info_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert attn.__version__ in said
    assert torch.__version__ in said
    for name in attn.planner.names():
        assert f"\n  {name} " in said


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"]["version"] == torch.__version__
    works = tuple(b["name"] for b in found["backends"] if b["works"])
    assert works == attn.available_backends()
    assert all(b["works"] or b["why_not"] for b in found["backends"])
    assert all(call["backend"] in works for call in found["calls"])


@pytest.mark.parametrize(
    ("stand_in", "said"),
    [
        ("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')", "not installed"),
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("raise ModuleNotFoundError(\"No module named 'sympy'\", name='sympy')", "sympy"),
        ("", "has no version"),
    ],
)
def test_info_with_a_broken_torch(tmp_path: Path, stand_in: str, said: str) -> None:
    (tmp_path / "torch.py").write_text(stand_in)
    plain, as_json = shell("info", beside=tmp_path), shell("info", "--json", beside=tmp_path)
    assert plain.returncode == as_json.returncode == 0, plain.stderr + as_json.stderr
    assert said in plain.stdout
    assert "Cure: pip install" in plain.stdout
    found = json.loads(as_json.stdout)
    assert found["torch"]["cure"].startswith("pip install")
    assert found["backends"] == []
    assert said in found["no_backends"]


def test_info_with_an_old_torch(tmp_path: Path) -> None:
    lines = ["__version__ = '2.4.1'", "version = cuda = type('old', (), {'cuda': None, 'hip': None})"]
    lines += ["cuda.is_available = lambda: False", "get_num_threads = lambda: 1"]
    (tmp_path / "torch.py").write_text("\n".join(lines))
    done = shell("info", beside=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2.4.1, older than 2.10. Cure: pip install -U 'torch>=2.10'" in done.stdout


def test_info_without_triton(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise ModuleNotFoundError(\"No module named 'triton'\", name='triton')")
    done = shell("info", "--json", beside=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["triton"]["problem"] == "not installed"
    assert {"sdpa", "reference"} <= {b["name"] for b in found["backends"] if b["works"]}


def test_info_with_a_broken_driver(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> bool:
        raise RuntimeError("CUDA driver is a stub library")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert "CUDA driver is a stub library" in said
    assert "\n  reference " in said


def test_a_reader_that_goes_away_is_no_error() -> None:
    env = os.environ | {"PYTHONPATH": str(Path(attn.__file__).parent.parent)}
    command = [sys.executable, "-m", "attn", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", LINE]) == 0
    assert main(["explain", *LINE.split(), "|", "B=2", "L=5"]) == 0
    first, second = capsys.readouterr().out.split(LINE)[1:]
    assert first == second
    assert "sdpa " in first
    assert "runs this call" in first


def test_explain_says_when_nothing_runs_a_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", LINE, "dropout", "--backend", "sdpa"]) == 1
    assert "does not do dropout" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["attention"], "too short"), ([LINE, "heads=3"], "heads=3"), ([LINE, "--backend", "fast"], "fast")],
)
def test_explain_refuses_what_it_does_not_understand(
    capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    assert main(["explain", *arguments]) == 2
    said = capsys.readouterr()
    assert word in said.err
    assert said.out == ""


def test_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(models, "QUICK", TINY)
    assert main(["demo", "--quick", "--out", str(tmp_path / "new" / "folder")]) == 0
    said = capsys.readouterr().out
    assert "The losses agree." in said
    for served in ("sdpa (call x 1)", "reference (forward x 1)"):
        assert served in said or "cpu (forward x 1)" in said
    assert str(tmp_path / "new" / "folder" / "demo.png") in said
    assert (tmp_path / "new" / "folder" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_slow_machine_stops_the_demo_early(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(models, "QUICK", dataclasses.replace(TINY, steps=50, seconds=0))
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    assert f"stopped after {train.FEWEST} of 50 steps" in capsys.readouterr().out


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "attn.cli.demo.figure", raising=False)
    monkeypatch.delattr("attn.cli.demo.figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.usefixtures("no_matplotlib")
def test_demo_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(models, "QUICK", TINY)
    assert main(["demo", "--quick"]) == 0
    said = capsys.readouterr().out
    assert "loss at step" in said
    assert "pip install 'attn-kernels[bench]'" in said


@pytest.mark.usefixtures("no_matplotlib")
def test_demo_fails_where_losses_differ(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def spoilt(model: torch.nn.Module) -> None:
        with torch.no_grad():
            model.head[1].bias += 0.01 * torch.arange(len(model.head[1].bias))

    monkeypatch.setattr(models, "QUICK", TINY)
    monkeypatch.setattr(train.attn, "replace", spoilt)
    assert main(["demo", "--quick"]) == 1
    assert "DO NOT AGREE" in capsys.readouterr().out


def test_a_nan_in_a_loss_is_no_agreement() -> None:
    model = torch.nn.Linear(1, 1)
    sides = [train.Training(model, torch.optim.SGD(model.parameters(), 1.0), torch.Generator()) for _ in range(2)]
    for side in sides:
        side.losses = [1.0, float("nan")]
    task = models.Task("", "", lambda: model, lambda *_: torch.zeros(()))
    assert not train.Pair(task, *sides, train.Counter()).agrees


@pytest.mark.slow
def test_quick_demo_as_a_newcomer_runs_it(tmp_path: Path) -> None:
    done = shell("demo", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The losses agree." in done.stdout


def test_table_aligns() -> None:
    lines = table(("a", "b"), [("long", "1"), ("x", "22")]).splitlines()
    assert lines == ["  a      b", "  ----  --", "  long   1", "  x     22"]


def test_progress_prints_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("attn.cli.progress.SECONDS_BETWEEN_LINES", 0.0)
    with progress("task", 2) as advance:
        advance("loss 1")
        advance("loss 2")
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"task: step 1 of 2, about \d+ s left, loss 1", first)
    assert second == "task: step 2 of 2, about 0 s left, loss 2"


def test_overhead_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert overhead.main(["--rounds", "2", "--json", str(tmp_path / "overhead.json")]) in (0, 1)
    found = json.loads((tmp_path / "overhead.json").read_text())
    said = capsys.readouterr().out
    assert len(found["rows"]) >= 5
    assert all(row["what"] in said and row["torch_us"] > 0 for row in found["rows"])
    assert torch.get_num_threads() == threads
