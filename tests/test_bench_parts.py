"""What `python -m attn bench` is made of: costs, the race, checks of a part, timers, peers."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_works import CALLS, CAUSAL, MODULES
from fake_timer import FakeTimer
from torch import Tensor
from torch.nn import functional as F

from attn.benchmarks import (
    checks,
    compare,
    harness,
    machine,
    peers,
    presets,
    problem,
    report,
    roofline,
    timer,
    work,
)
from attn.benchmarks.harness import Row
from attn.benchmarks.peers import Contender
from attn.benchmarks.work import Work
from attn.spec import Operands
from attn.testing import assert_close, oracle


def test_bytes_are_moved_once() -> None:
    w = work.parse("attention forward cpu bfloat16 full B=2 H=4 Hkv=2 L=10 D=8")
    assert work.cost_of_call(w, w.operands()).bytes == 2 * (2 * 2 * 4 * 10 * 8 + 2 * 2 * 2 * 10 * 8)


def test_a_roofline() -> None:
    roof = roofline.Roofline({"float32": 100.0, "bfloat16": 10.0}, 10.0)
    heavy, light = work.Cost(10**9, 10**6), work.Cost(10**6, 10**8)
    assert (roof.floor_ms(heavy, "bfloat16"), roof.bound(heavy, "bfloat16")) == (10.0, "math")
    assert (roof.floor_ms(light, "float32"), roof.bound(light, "float32")) == (10.0, "memory")
    quicker, busy = roofline.Roofline({"float32": 120.0, "bfloat16": 8.0}, 9.0), roof
    assert busy.or_better(quicker) == roofline.Roofline({"float32": 120.0, "bfloat16": 10.0}, 10.0)
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


def test_works_are_visited_in_turns_and_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    works = [work.parse(CALLS[0]), work.parse(MODULES[0])]

    def lineup(w: Work, who: harness.Who) -> harness.Lineup:
        visit = sum(e == f"visit {w.kind}" for e in events)
        events.append(f"visit {w.kind}")

        def prepare(name: str) -> Callable[[], object]:
            if name == "weak" and visit == 2:
                raise MemoryError("no room")
            if name == "broken" and visit == 2:
                raise AssertionError("an internal one")
            return lambda: None

        def check(c: Contender) -> float:
            events.append(f"check {c.name} {w.kind}")
            if c.name == "wrong":
                raise AssertionError("off by one")
            return 0.5

        names = ("sound", "weak", "wrong", "broken")
        found = [Contender(name, lambda: torch.ones(1)) for name in names]
        runs = {name: (lambda name=name: prepare(name)) for name in names}
        return harness.Lineup(found, runs, check, work.Cost(1, 1), {})

    monkeypatch.setattr(harness, "lineup", lineup)
    told: list[str] = []
    *_, results = harness.visits(works, FakeTimer(), 0.0, advance=told.append)  # type: ignore[arg-type]
    assert [e for e in events if e.startswith("visit")] == ["visit attention", "visit module"] * harness.VISITS
    assert sorted(e for e in events if e.startswith("check")) == sorted(
        f"check {name} {kind}" for name in ("sound", "weak", "wrong", "broken") for kind in ("attention", "module")
    )
    assert told == [str(w) for w in works] * harness.VISITS
    assert [r.work for r in results] == works
    for result in results:
        sound, weak, wrong, broken = result.rows
        assert len(sound.ms) == harness.VISITS * harness.ROUNDS_OF_VISIT[0]
        assert (weak.ms, weak.problem, weak.wrong) == ([], "MemoryError: no room", False)
        assert (broken.ms, broken.problem, broken.wrong) == ([], "AssertionError: an internal one", False)
        assert (wrong.ms, wrong.problem, wrong.wrong) == ([], "off by one", True)


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


def test_committed_results_can_still_be_read() -> None:
    paths = list((Path(presets.__file__).parent / "results").glob("bench-*.json"))
    assert paths
    for path in paths:
        found = json.loads(path.read_text())
        assert not set(machine.SAME) - set(found["machine"]) - {"gpu", "arch"}
        for f in found["results"]:
            w = work.parse(f["work"])
            result = harness.Result(
                w, f["flops"], f["bytes"], [Row(r["contender"], r["ours"], r["ms"]) for r in f["rows"]], {}
            )
            assert [c.ratio for c in compare.changes(result, f)] == [1.0]
        assert report.summary(found["results"])


def test_the_summary_has_the_median_of_the_ratio_within_rounds() -> None:
    ours = [1.0, 2.0, 4.0, 1.0, 1.0]
    theirs = [2.0, 6.0, 16.0, 99.0, 0.01]  # the ratio of the medians would be 6
    rows = [Row("attn cpu", True, ours), Row("peer", False, theirs)]
    found = report.plain(harness.Result(Work(), 1, 1, rows, {}), roofline.Roofline({"float32": 1.0}, 1.0))
    assert "3.00 x" in report.summary([found])[0]


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


def test_a_call_finds_the_memory_of_those_before_it() -> None:
    """Twice as large as any block that glibc keeps by itself. Aligned blocks take a few calls to find their place."""
    resource = pytest.importorskip("resource")
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("mallopt is glibc's")
    clock = timer.CpuTimer()
    run = clock.prepared(lambda: torch.empty(64 << 20, dtype=torch.uint8).fill_(1))
    for _ in range(20):
        clock.sample(run)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    clock.sample(run)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < (64 << 20) / resource.getpagesize() / 10


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
