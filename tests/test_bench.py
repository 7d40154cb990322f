"""`python -m attn bench`: nothing wrong gets a time, nothing slower goes unseen, and what is counted is exact."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_works import CALLS, CAUSAL, MODULES
from fake_timer import FakeTimer

from attn.backends.reference import ReferenceBackend
from attn.benchmarks import compare, harness, presets, report, roofline, timer, work
from attn.benchmarks.harness import Row
from attn.benchmarks.work import Work
from attn.cli import main


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeTimer]:
    """Puts a fake timer, and a fixed roofline, in the place of the real ones."""

    def install(**options: Any) -> FakeTimer:
        made = FakeTimer(**options)
        monkeypatch.setattr(timer, "timer_for", lambda device: made)
        found = roofline.Roofline({"float32": 100.0, "bfloat16": 100.0}, 10.0)
        monkeypatch.setattr(roofline, "measure", lambda *_: found)
        return made

    return install


@pytest.mark.parametrize("line", [*CALLS, *MODULES])
def test_everyone_computes_the_same(line: str) -> None:
    """Peers included: another mask or layout than ours would be another problem."""
    (result,) = harness.measure([work.parse(line)], FakeTimer(), 0.0)  # type: ignore[arg-type]
    assert {r.problem for r in result.rows} <= {"", "RuntimeError: No available kernel. Aborting execution."}
    ran = [r for r in result.rows if not r.problem]
    assert {r.ours for r in ran} == {True, False}
    assert all(len(r.ms) == harness.VISITS * harness.ROUNDS_OF_VISIT[0] and 0 < r.error <= 1 for r in ran)
    assert result.flops > 0
    assert result.bytes > 0


def test_a_wrong_kernel_gets_no_speed(
    fake: Callable[..., FakeTimer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake()
    right = ReferenceBackend.backward

    def wrong(self: ReferenceBackend, *args: Any) -> Any:
        dq, dk, dv, d_bias = right(self, *args)
        return dq, dk * 1.001, dv, d_bias

    out = tmp_path / "out.json"
    command = ["bench", *CAUSAL.split(), "--backend", "reference", "--json", str(out)]
    assert main(command) == 0
    capsys.readouterr()
    monkeypatch.setattr(ReferenceBackend, "backward", wrong)
    assert main(command) == 1
    said = capsys.readouterr().out
    ours = next(line for line in said.splitlines() if "attn reference" in line)
    assert ours.split() == ["attn", "reference", "WRONG"]
    assert "dk float32" in said
    assert "attn is quicker" not in said
    rows = {r["contender"]: r for r in json.loads(out.read_text())["results"][0]["rows"]}
    assert rows["attn reference"]["p50_ms"] is None
    assert rows["attn reference"]["ms"] == []
    assert rows["sdpa flash"]["p50_ms"] > 0


def test_noise_is_no_regression_and_half_as_slow_again_is(
    fake: Callable[..., FakeTimer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, lines = tmp_path / "first.json", [CAUSAL, "module forward cpu float32 full B=1 H=2 L=20 D=8"]
    for line in lines:
        fake(noise=0.1)
        assert main(["bench", *line.split(), "--json", str(first)]) == 0
        for seed in range(1, 6):
            fake(noise=0.1, weather=0.5 + 0.4 * seed, seed=seed)
            assert main(["bench", *line.split(), "--compare", str(first)]) == 0
        capsys.readouterr()
        fake(noise=0.1, slow=1.5, weather=0.6, seed=9)
        assert main(["bench", *line.split(), "--compare", str(first)]) == 1
        said = capsys.readouterr().out
        assert "SLOWER" in next(row for row in said.splitlines() if row.startswith(line))


def test_what_is_slower_once_is_measured_again(
    fake: Callable[..., FakeTimer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = tmp_path / "first.json"
    fake()
    assert main(["bench", *CAUSAL.split(), "--json", str(first)]) == 0
    made = fake(slow=2.0)
    visits, calls = harness.visits, []

    def once(*args: Any) -> Iterator[list[harness.Result]]:
        calls.append(args)
        made.slow = 2.0 if len(calls) == 1 else 1.0
        return visits(*args)

    monkeypatch.setattr(harness, "visits", once)
    assert main(["bench", *CAUSAL.split(), "--compare", str(first)]) == 0
    assert len(calls) == 2


def test_noise_that_hides_a_slow_down_is_told() -> None:
    quiet, noisy = compare.Change("a", "attn cpu", 1.0, 1.25), compare.Change("b", "attn cpu", 1.4, 2.0)
    assert "1 of 2 are too noisy" in report.changed([quiet, noisy])[-1]
    assert "noisy" not in report.changed([quiet])[-1]


def test_a_time_that_is_lost_is_a_regression() -> None:
    row = Row("attn cpu", True, problem="out is wrong", wrong=True)
    before = {"rows": [{"contender": "attn cpu", "ms": [1.0, 2.0]}]}
    (change,) = compare.changes(harness.Result(Work(), 1, 1, [row], {}), before)
    assert change.slower
    assert change.words == "out is wrong"
    assert compare.changes(harness.Result(Work(), 1, 1, [row], {}), None) == []


@pytest.mark.parametrize(
    ("content", "word"),
    [(None, "No such file"), ("{", "not what bench"), ("[]", "not what bench"), ('{"results": []}', "not what bench")],
)
def test_compare_needs_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, word: str
) -> None:
    path = tmp_path / "old.json"
    if content is not None:
        path.write_text(content)
    assert main(["bench", *CAUSAL.split(), "--compare", str(path)]) == 2
    assert word in capsys.readouterr().err


def test_compare_refuses_another_machine(
    fake: Callable[..., FakeTimer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake()
    path = tmp_path / "old.json"
    assert main(["bench", *CAUSAL.split(), "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    found["machine"]["threads"] = 99
    path.write_text(json.dumps(found))
    assert main(["bench", *CAUSAL.split(), "--compare", str(path)]) == 2
    assert "threads 99 then" in capsys.readouterr().err


def test_files_and_table(
    fake: Callable[..., FakeTimer], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(slow=0.5)
    monkeypatch.setitem(sys.modules, "rich.console", None)  # plain lines, as where rich is not installed
    out = tmp_path / "out.csv"
    assert main(["bench", *CAUSAL.split(), "--csv", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    said = capsys.readouterr().out
    assert {r["contender"] for r in rows} >= {"sdpa flash", "sdpa math"}
    assert all(r["work"] == CAUSAL and float(r["p50_ms"]) in (5.0, 10.0) for r in rows)
    table = said.partition("\n\n")[0].splitlines()
    assert table[0].split() == ["p20", "p50", "ms", "p80", "GFLOP/s", "roofline", "MiB", "error"]
    assert table[1] == "attention forward + backward, float32, causal B1 H2 L40 D16"
    starred = [line for line in table if line.startswith("*")]
    assert len(starred) == 1
    assert "attn" in starred[0]
    assert starred[0].split()[3:6] == ["5.00", "5.00", "5.00"]
    assert "flash-attn: not installed" in said
    assert "100 GFLOP/s (matrix product), 10.0 GB/s (copy)" in said


def test_figure(fake: Callable[..., FakeTimer], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    fake()
    from matplotlib.image import imread

    for arguments in (CAUSAL.split(), ["--preset", "vit", "--seqlen", "8,16", "--batch", "1", "--heads", "2"]):
        out = tmp_path / "figure.png"
        assert main(["bench", *arguments, "--plot", str(out)]) == 0
        pixels = imread(out)
        assert min(pixels.shape[:2]) > 500
        assert pixels.std() > 0.05
        out.unlink()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["attention", "forward"], "too short"),
        (CAUSAL.replace("B=1", "B=x").split(), "whole number"),
        (CAUSAL.replace("causal", "diagonal").split(), "known: full, causal"),
        (CAUSAL.replace("float32", "int").split(), "bfloat16"),
        ([*CAUSAL.split(), "--seqlen", "8"], "leave out"),
        (["--backend", "fast"], "fast"),
        (["--peer", "fast"], "sdpa flash"),
        (["--preset", "decode", "--mask", "window"], "decoding step"),
        (CALLS[-1].replace("alibi", "dropout").split(), "dropout"),
        (CALLS[-1].replace("forward", "both").split(), "grad"),
        ([*CAUSAL.replace("cpu", "nowhere").split()], "no such device"),
    ],
)
def test_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], word: str) -> None:
    assert main(["bench", *arguments]) == 2
    assert word in capsys.readouterr().err


def test_list_and_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["bench", "--list", "--device", "cpu", "--dtype", "float32", "--seqlen", "16,32", "--mask", "window"]) == 0
    )
    said, left_out = capsys.readouterr()
    listed = [work.parse(line) for line in said.splitlines()]
    assert {w.L for w in listed} == {16, 32}
    assert {w.mask for w in listed} == {"window"}
    assert "a module takes full" in left_out


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_presets_are_lines(name: str, device: str) -> None:
    works = list(presets.PRESETS[name](device))
    assert len({str(w) for w in works}) == len(works) > 0
    assert all(work.parse(str(w)) == w for w in works)
    assert all(w.case.spec.device == device for w in works if w.kind in work.CALLS)


@pytest.mark.parametrize("line", [*CALLS, *MODULES])
def test_lines_are_read_back(line: str) -> None:
    found = work.parse(line)
    assert str(found) == line
    if found.kind in work.CALLS:
        again = work.parse(f"{found.what} {found.case}")
        assert again.case == found.case
        assert again.L == found.L


def test_a_result_without_times_has_nothing_to_draw(tmp_path: Path) -> None:
    plots = pytest.importorskip("attn.benchmarks.plots")
    row = Row("attn cpu", True, problem="no", wrong=True)
    roof = roofline.Roofline({"float32": 1.0}, 1.0)
    found = report.plain(harness.Result(Work(), 1, 1, [row], {}), roof)
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.draw({"results": [found], "machine": {}, "roofline": {}}, tmp_path / "x.png")
