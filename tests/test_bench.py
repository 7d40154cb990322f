"""`python -m attn bench`: nothing wrong gets a time, nothing slower goes unseen, and what is counted is exact."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_timer import FakeTimer
from torch import Tensor
from torch.nn import functional as F

from attn.backends.reference import ReferenceBackend
from attn.benchmarks import checks, compare, harness, peers, presets, problem, report, roofline, timer, work
from attn.benchmarks.harness import Row
from attn.benchmarks.peers import Contender
from attn.benchmarks.work import Work
from attn.cli import main
from attn.spec import Operands
from attn.testing import assert_close, oracle

CAUSAL = "attention both cpu float32 causal B=1 H=2 L=40 D=16"
CALLS = [
    "attention forward cpu float32 full B=1 H=2 L=33 D=16",
    "attention both cpu float32 causal B=2 H=4 Hkv=2 L=40 D=16",
    "attention backward cpu bfloat16 causal B=1 H=2 L=70 D=16",
    "attention forward cpu float32 window B=1 H=1 L=300 D=8",
    "attention both cpu float32 padding B=3 H=2 L=40 D=16",
    "attention both cpu float32 documents B=2 H=2 L=40 D=16",
    "attention both cpu float32 random B=2 H=2 L=40 D=16",
    "attention both cpu float32 bias B=2 H=2 L=40 D=16",
    "attention forward cpu float32 alibi B=2 H=2 L=40 D=16",
    "varlen both cpu float32 causal B=3 H=4 Hkv=2 L=40 D=16",
    "decode forward cpu float32 full B=3 H=4 Hkv=2 L=1 S=70 D=16",
    "decode forward cpu float32 full B=2 H=2 L=3 S=70 D=16",
    "forward attention cpu float32 head_dim=8 value_dim=6 band=end causal alibi | "  # the line of a case
    "B=1 Hq=2 Hkv=2 L=9 S=33 right=0 seed=3",
]
MODULES = [
    "module forward cpu float32 full weights=mean B=2 H=2 L=20 D=8",
    "module both cpu float32 causal B=2 H=2 L=20 D=8",
    "module both cpu float32 padding weights=mean B=2 H=2 L=20 D=8",
    "layer both cpu float32 padding B=2 H=2 L=20 D=8 layers=2",
    "layer forward cpu float32 causal B=2 H=2 L=20 D=8",
]


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
    result = harness.measure(work.parse(line), FakeTimer(), 0.0)
    assert {r.problem for r in result.rows} <= {"", "RuntimeError: No available kernel. Aborting execution."}
    ran = [r for r in result.rows if not r.problem]
    assert {r.ours for r in ran} == {True, False}
    assert all(len(r.ms) == harness.ROUNDS[0] and 0 < r.error <= 1 for r in ran)
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
    measure, calls = harness.measure, []

    def once(*args: Any) -> harness.Result:
        calls.append(args)
        made.slow = 2.0 if len(calls) == 1 else 1.0
        return measure(*args)

    monkeypatch.setattr(harness, "measure", once)
    assert main(["bench", *CAUSAL.split(), "--compare", str(first)]) == 0
    assert len(calls) == 2


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


@pytest.mark.parametrize("line", CALLS[:9])
def test_flops_are_those_of_visible_pairs(line: str) -> None:
    w = work.parse(line)
    x = w.operands()
    assert isinstance(x, Operands)
    by_hand = _pairs_by_hand(x)
    D = w.D
    per_pair = {"forward": 4 * D, "backward": 10 * D, "both": 14 * D}[w.what]
    assert work.cost_of_call(w, x).flops == by_hand * per_pair


def _pairs_by_hand(x: Operands) -> int:
    """Counted one by one."""
    B, H, L, _ = x.q.shape
    seen = 0
    for b in range(B):
        for i in range(L):
            for j in range(x.k.shape[2]):
                visible = (x.right < 0 or j <= i + x.right) and (x.left < 0 or j >= i - x.left)
                if x.key_lengths is not None:
                    visible = visible and j < int(x.key_lengths[b])
                if x.ids_q is not None and x.ids_k is not None:
                    visible = visible and int(x.ids_q[b, i]) == int(x.ids_k[b, j])
                if x.keep is not None:
                    visible = visible and bool(x.keep[0, 0, i, j])
                seen += bool(visible)
    return seen * H


def test_flops_of_packed_calls_and_of_decoding() -> None:
    packed = work.parse(CALLS[9])
    x = packed.operands()
    assert isinstance(x, Operands)
    lengths = x.cu_seqlens_q.diff().tolist()  # type: ignore[union-attr]
    assert work.cost_of_call(packed, x).flops == sum(n * (n + 1) // 2 for n in lengths) * packed.H * 14 * packed.D
    step = work.parse(CALLS[11])
    lengths = work.padding_lengths(step).tolist()
    pairs = sum(n + (n - 1) + (n - 2) for n in lengths) * step.H
    assert work.cost_of_call(step, step.operands()).flops == pairs * 4 * step.D


def test_bytes_are_moved_once() -> None:
    w = work.parse("attention forward cpu bfloat16 full B=2 H=4 Hkv=2 L=10 D=8")
    assert work.cost_of_call(w, w.operands()).bytes == 2 * (2 * 2 * 4 * 10 * 8 + 2 * 2 * 2 * 10 * 8)


def test_a_roofline() -> None:
    roof = roofline.Roofline({"float32": 100.0, "bfloat16": 10.0}, 10.0)
    heavy, light = work.Cost(10**9, 10**6), work.Cost(10**6, 10**8)
    assert (roof.floor_ms(heavy, "bfloat16"), roof.bound(heavy, "bfloat16")) == (10.0, "math")
    assert (roof.floor_ms(light, "float32"), roof.bound(light, "float32")) == (10.0, "memory")
    found = roofline.measure(FakeTimer(), "cpu", {"float64"})  # type: ignore[arg-type]
    assert found.gflops["float64"] == 2 * 1024**3 / 10.0 / 1e6
    assert found.gbytes == 2 * roofline.COPIED["cpu"] / 10.0 / 1e6


def test_one_that_raises_is_out_and_the_race_goes_on() -> None:
    def crash() -> Tensor:
        raise RuntimeError("no such instruction")

    found = [Contender("a", crash), Contender("b", lambda: torch.ones(1)), Contender("c", lambda: torch.ones(1))]
    order: list[str] = []

    def run(name: str) -> Callable[[], Callable[[], object]]:
        return lambda: lambda: order.append(name)

    def check(c: Contender) -> float:
        if c.name == "c":
            raise AssertionError("off by one")
        c.call()
        return 0.5

    runs = {name: run(name) for name in "abc"}
    rows = {r.contender: r for r in harness.race(found, runs, check, FakeTimer(), 0.0)}  # type: ignore[arg-type]
    assert (rows["a"].problem, rows["a"].wrong, rows["a"].ms) == ("RuntimeError: no such instruction", False, [])
    assert (rows["c"].problem, rows["c"].wrong, rows["c"].ms) == ("off by one", True, [])
    assert len(rows["b"].ms) == harness.ROUNDS[0]
    assert set(order) == {"b"}


def test_turns_change_and_time_ends_them() -> None:
    order: list[str] = []

    class Timer(FakeTimer):
        def sample(self, run: Callable[[], object]) -> float:
            self.clock += 1.0
            run()
            return 1.0

    found = [Contender(name, lambda: torch.ones(1)) for name in "ab"]
    runs = {name: (lambda n=name: lambda: order.append(n)) for name in "ab"}
    rows = harness.race(found, runs, lambda c: 0.0, Timer(), seconds=20.0)  # type: ignore[arg-type]
    assert len(rows[0].ms) == len(rows[1].ms) == 10  # two samples a round, a second each
    assert order[-4:] == ["a", "b", "b", "a"]
    many = harness.race(found, runs, lambda c: 0.0, FakeTimer(), seconds=1e9)  # type: ignore[arg-type]
    assert len(many[0].ms) == harness.ROUNDS[1]


def test_warm_up_ends_when_times_settle() -> None:
    class Timer(FakeTimer):
        times = iter((9.0, 5.0, 3.0, 2.9, *[1.0] * 100))

        def sample(self, run: Callable[[], object]) -> float:
            return next(self.times)

    (row,) = harness.race(
        [Contender("a", lambda: torch.ones(1))],
        {"a": lambda: lambda: None},
        lambda c: 0.0,
        Timer(),  # type: ignore[arg-type]
        0.0,
    )
    assert row.ms == [1.0] * harness.ROUNDS[0]


def test_percentiles() -> None:
    row = Row("a", True, ms=[4.0, 1.0, 2.0, 3.0, 5.0, 6.0])
    assert (row.percentile(20), row.median, row.percentile(80)) == (2.0, 3.5, 5.0)


@pytest.mark.parametrize("line", [CAUSAL, CALLS[7], CALLS[8], CALLS[9], CALLS[10]])
def test_a_part_of_a_large_call_is_checked(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample must give the numbers of the whole call, and find errors in it."""
    w = work.parse(line)
    case, x = w.case, w.operands()
    monkeypatch.setitem(checks.SCORES, "cpu", 300)
    expected = checks.expected(case, x)
    p = problem.problem(case, x)
    call = peers.ours(p, "reference")
    out = call()
    grads = () if expected.d_out is None else torch.autograd.grad(out, p.leaves, expected.d_out)
    assert expected.worst(out.detach(), grads) <= 1
    whole = oracle(x, (expected.d_out, None, None))
    part = whole["out"].value[:, expected.heads]
    if expected.rows is not None:
        assert 2 <= len(expected.rows) < w.L
        assert {0, w.L - 1} <= set(expected.rows.tolist())
        part = part[:, :, expected.rows]
    assert_close(expected.exact["out"].value, part)
    assert part.numel() < whole["out"].value.numel()
    off = out.detach().clone()
    off[:, -1, -1] += 0.1
    with pytest.raises(AssertionError, match="out float32"):
        expected.worst(off, grads)
    off = out.detach().clone()
    off[:, 0, min(1, w.L - 1)] = torch.nan  # in no sample
    with pytest.raises(AssertionError, match="not finite"):
        expected.worst(off, grads)
    for n in range(len(grads)):
        wrong = [g + (0.1 if i == n else 0.0) for i, g in enumerate(grads)]
        with pytest.raises(AssertionError, match="beyond the bound"):
            expected.worst(out.detach(), tuple(wrong))


def test_a_module_that_is_wrong_is_caught() -> None:
    from attn.benchmarks import modules

    m = modules.problem(work.parse(MODULES[1]))
    expected = modules.ModuleExpected(m)
    assert expected.worst(m.ours) <= 1
    with torch.no_grad():
        next(iter(m.ours.parameters())).add_(0.01)
    with pytest.raises(AssertionError, match="out"):
        expected.worst(m.ours)


def test_memory_of_a_call() -> None:
    measured = timer.CpuTimer().memory(lambda: torch.empty(16 << 20, dtype=torch.uint8).fill_(1))
    if measured is None:
        pytest.skip("this system does not tell a process its high-water mark")
    assert 15 << 20 < measured < 24 << 20


def test_memory_is_unknown_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timer, "RESET", tmp_path / "missing" / "file")
    assert timer.CpuTimer().memory(lambda: None) is None


def test_the_cpu_timer_times_one_call() -> None:
    seen: list[int] = []
    clock = timer.CpuTimer()
    ms = clock.sample(clock.prepared(lambda: seen.append(1)))
    assert len(seen) == 2
    assert ms > 0


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("name", ["flash-attn", "flash-attn-4", "xformers"])
def test_installed_libraries_are_called_right(name: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With modules of their names that compute by PyTorch: sizes, layouts and options as their documents have them."""

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
        assert q.shape[1:3] == (20, 2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)

    class LowerTriangularMask:
        pass

    flash: Any = types.ModuleType("flash_attn")
    flash.flash_attn_func = lambda q, k, v, *, softmax_scale, causal, alibi_slopes: attend(
        q, k, v, causal, softmax_scale
    )
    four: Any = types.ModuleType("flash_attn.cute")
    four.flash_attn_func = lambda q, k, v, *, softmax_scale, causal: (attend(q, k, v, causal, softmax_scale), None)
    ops: Any = types.ModuleType("xformers.ops")
    ops.LowerTriangularMask = LowerTriangularMask
    ops.memory_efficient_attention = lambda q, k, v, *, attn_bias, scale: attend(
        q, k, v, isinstance(attn_bias, LowerTriangularMask), scale
    )
    for module in (flash, four, ops, types.ModuleType("xformers")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    w = work.parse(f"attention forward cpu bfloat16 {mask} B=2 H=2 L=20 D=16")
    x = w.operands()
    on_gpu = dataclasses.replace(w.case, spec=w.case.spec._replace(device="cuda"))
    out = peers.PEERS[name](problem.problem(on_gpu, x))()
    checks.expected(w.case, x).worst(out, ())
    with pytest.raises(problem.Absent, match="CUDA only"):
        peers.PEERS[name](problem.problem(w.case, x))


def test_who_is_not_there_is_listed_with_the_reason() -> None:
    w = work.parse(CALLS[0])
    found, absent = peers.contenders(problem.problem(w.case, w.operands()), (), ())
    assert absent["flash-attn-4"] == "not installed"
    assert absent["sdpa cudnn"] == "runs on a GPU only"
    assert "--peer flex" in absent["flex"]
    assert {c.name for c in found} | set(absent) >= set(peers.PEERS)
    only, _ = peers.contenders(problem.problem(w.case, w.operands()), ("reference",), ("sdpa math",))
    assert [c.name for c in only] == ["attn reference", "sdpa math"]
    refused, why = peers.contenders(problem.problem(w.case, w.operands()), ("triton",), ("sdpa math",))
    assert [c.name for c in refused] == ["sdpa math"]
    assert why["attn triton"]


def test_flex_attention_is_given_the_same_mask() -> None:
    """Its mask function, position by position, without the compiler that it needs."""
    from attn import masks
    from attn.benchmarks import peers_torch

    for line in (CAUSAL, CALLS[3], CALLS[4], CALLS[5], CALLS[6], CALLS[12]):
        x = work.parse(line).operands()
        assert isinstance(x, Operands)
        B, H, L, _ = x.q.shape
        S = x.k.shape[2]
        grid = torch.meshgrid(*(torch.arange(n) for n in (B, H, L, S)), indexing="ij")
        seen = masks.visibility(x, L, S)
        assert seen is not None
        assert torch.equal(peers_torch._visible(x, L, S)(*grid), seen.expand(B, H, L, S))
    for line in (CALLS[7], CALLS[8]):
        x = work.parse(line).operands()
        assert isinstance(x, Operands)
        B, H, L, _ = x.q.shape
        grid = torch.meshgrid(*(torch.arange(n) for n in (B, H, L, L)), indexing="ij")
        dense = problem.dense_mask(x)
        assert dense is not None
        assert_close(peers_torch._biased(x, L, L)(torch.zeros(B, H, L, L), *grid), dense.expand(B, H, L, L).detach())


def test_a_result_without_times_has_nothing_to_draw(tmp_path: Path) -> None:
    plots = pytest.importorskip("attn.benchmarks.plots")
    row = Row("attn cpu", True, problem="no", wrong=True)
    roof = roofline.Roofline({"float32": 1.0}, 1.0)
    found = report.plain(harness.Result(Work(), 1, 1, [row], {}), roof)
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.draw({"results": [found], "machine": {}, "roofline": {}}, tmp_path / "x.png")
