"""`python -m attn profile`: whose time it is, what ranges are named, what is printed, and the commands of the tools."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_timer import FakeTimer
from torch import nn

import attn
from attn import ops
from attn.backends import load
from attn.backends.reference import ReferenceBackend
from attn.benchmarks import profiling, roofline, timer
from attn.cli import main
from attn.cli.profile import tool_commands
from attn.spec import AttentionSpec

LINE = "attention both cpu float32 causal B=1 H=2 L=40 D=16"
CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


@pytest.fixture(autouse=True)
def _fixed_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timer, "timer_for", lambda device: FakeTimer())
    found = roofline.Roofline({"float32": 100.0}, 10.0)
    monkeypatch.setattr(roofline, "measure", lambda *_: found)


def step() -> None:
    """What a user would name: a projection, attention forward and backward, something else."""
    layer = nn.Linear(32, 32)
    x = layer(torch.ones(2, 8, 32)).view(2, 8, 2, 16).transpose(1, 2)
    attn.attention(x, x, x, mask=attn.masks.causal()).exp().sum().backward()


def test_a_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["profile", *LINE.split(), "--steps", "2", "--backend", "reference", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(LINE)
    for words in ("where time goes", "attention", "CPU operation", "Roofline: ", "bound by", "ran on a CPU"):
        assert words in said
    ranges = re.findall(r"^attn reference (\w+): attention cpu float32", said, re.MULTILINE)
    assert set(ranges) == {"forward", "backward"}
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert any(name.startswith("attn reference backward: attention cpu float32 head_dim=16") for name in names)
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["steps"] == 2
    assert found["shares"]["attention"] > 0
    pairs = 40 * 41 // 2 * 2
    assert f"{pairs * 14 * 16 / 1e9:.4g} GFLOP and at least" in said
    assert f"{pairs * 14 * 16 / 10 / 1e6:.4g} GFLOP/s" in said  # the fake timer's 10 ms


def test_a_module_on_a_named_backend(capsys: pytest.CaptureFixture[str]) -> None:
    line = "module both cpu float32 full B=1 H=2 L=20 D=8"
    assert main(["profile", *line.split(), "--steps", "1", "--backend", "reference"]) == 0
    assert set(re.findall(r"^attn (\w+ \w+): attention cpu", capsys.readouterr().out, re.MULTILINE)) == {
        "reference forward",
        "reference backward",
    }


def test_a_function(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine_to_profile.py").write_text("from test_profile import step\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "test_profile", sys.modules[__name__])
    assert main(["profile", "mine_to_profile:step", "--steps", "1"]) == 0
    said = capsys.readouterr().out
    counted = re.search(r"counts ([\d.e-]+) GFLOP in a step", said)
    assert counted
    linear = 2 * 16 * 32 * 32 * 2  # forward and the gradient of its weight
    pairs = 2 * 2 * (8 * 9 // 2)
    assert float(counted[1]) * 1e9 == pytest.approx(linear + pairs * 14 * 16, rel=1e-3)
    rows = {line.split("  ")[0]: line for line in said.splitlines()}
    assert not rows["projections and other matrix products"].rstrip().endswith(" 0.000   0%")
    assert main(["profile", "mine_to_profile:number"]) == 2
    assert main(["profile", "mine_to_profile:missing"]) == 2
    assert main(["profile", "not_mine_at_all:step"]) == 2
    said = capsys.readouterr().err
    assert "is no function" in said
    assert "has no 'missing'" in said
    assert "no module 'not_mine_at_all'" in said


def test_an_unfollowable_function_is_not_counted() -> None:
    module = nn.Linear(4, 4)
    with pytest.raises(ZeroDivisionError):
        profiling.counted(lambda: 1 // 0)

    def gradients() -> Any:
        return torch.autograd.grad(module(torch.ones(2, 4)).sum(), list(module.parameters()))

    count = profiling.counted(gradients)
    assert count is None or count > 0


def test_what_is_wrong_is_not_profiled(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = ReferenceBackend.forward
    monkeypatch.setattr(ReferenceBackend, "forward", lambda self, x: (right(self, x)[0] * 1.01, *right(self, x)[1:]))
    assert main(["profile", *LINE.split(), "--backend", "reference"]) == 1
    assert "wrong, and so not profiled" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["attention"], "too short"),
        ([*LINE.split(), "--backend", "fast"], "fast"),
        ([*LINE.split(), "--steps", "0"], "at least 1"),
        ([*LINE.replace("cpu", "cuda").split()], "no GPU"),
        (["decode forward cpu float16 full B=1 H=1 L=1 S=9 D=16", "--backend", "sdpa"], "decode"),
    ],
)
def test_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], word: str) -> None:
    if word == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["profile", *arguments]) == 2
    assert word in capsys.readouterr().err


def test_a_tool_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["profile", *LINE.split(), "--tool", "ncu"]) == 2
    assert "ncu is not on the path" in capsys.readouterr().err


def test_once_only_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with attn.testing.spy() as calls:
        assert main(["profile", *LINE.split(), "--backend", "reference", "--once", "--steps", "3"]) == 0
    assert capsys.readouterr().out == ""
    assert calls[-6:] == [("reference", "forward"), ("reference", "backward")] * 3


def test_ranges_leave_nothing_behind() -> None:
    reference = load("reference")
    before = dict(vars(reference))
    q = torch.ones(1, 1, 4, 8)
    with profiling.ranges(), torch.profiler.profile() as seen:
        attn.attention(q, q, q, backend="reference")
        attn.attention(q, q, q, backend="sdpa")
        attn.decode_attention(q[:, :, :1], q, q, lengths=torch.tensor([3], dtype=torch.int32), backend="reference")
    assert vars(reference) == before
    found = [e.name for e in seen.events() if e.name.startswith(profiling.RANGE)]
    specs = [AttentionSpec.parse(name.partition(": ")[2].partition("|")[0]) for name in found]
    assert [name.split()[1] for name in found] == ["reference", "sdpa", "reference"]
    assert [spec.op for spec in specs] == ["attention", "attention", "decode"]
    assert all(spec.head_dim == 8 for spec in specs)
    assert ops.load("reference") is reference


@dataclass
class Span:
    start: float
    end: float

    def elapsed_us(self) -> float:
        return self.end - self.start


@dataclass
class Event:
    """As torch.profiler gives them, times in microseconds."""

    name: str
    time_range: Span
    device_type: Any = CPU
    cpu_parent: Event | None = None
    self_device_time_total: float = 0.0
    device_time_total: float = 0.0
    self_cpu_time_total: float = 0.0
    cpu_time_total: float = 0.0
    kernels: Sequence[Event] = field(default=())
    is_user_annotation: bool = False


def test_a_trace_of_a_gpu_is_sorted_out() -> None:
    """Two steps: a projection, an attention kernel launched by a range of ours, a gap of 30 µs in each."""
    events: list[Event] = []
    for start in (0.0, 1000.0):
        events.append(Event(profiling.STEP, Span(start, start + 500)))
        linear = Event("aten::linear", Span(start, start + 10))
        mm = Event("aten::addmm", Span(start, start + 9), cpu_parent=linear, self_device_time_total=100.0)
        ranged = Event("attn triton forward: attention cuda", Span(start + 10, start + 30), device_time_total=200.0)
        kernel = Event("void ns::attend<64>(Params)", Span(start + 230, start + 430), CUDA)
        launch = Event("launch", Span(start + 12, start + 20), CPU, ranged, 200.0, kernels=[kernel])
        gelu = Event("aten::gelu", Span(start + 31, start + 33), self_device_time_total=20.0)
        events += [linear, mm, ranged, launch, gelu, kernel]
        events.append(Event(ranged.name, Span(start + 200, start + 470), CUDA, is_user_annotation=True))
        events.append(Event("gemm", Span(start + 100, start + 200), CUDA))
        events.append(Event("gelu_kernel", Span(start + 430, start + 450), CUDA))
    found = profiling.summary(events, steps=2)
    assert found.device
    assert found.wall == pytest.approx(0.5)
    assert list(found.shares.values()) == pytest.approx([0.2, 0.1, 0.02])
    assert found.kernels[0] == ("void ns::attend<64>(Params)", pytest.approx(0.2), 1)
    assert found.ranges == [("attn triton forward: attention cuda", pytest.approx(0.2), 1)]
    assert found.idle == pytest.approx((30 + 30 + 650) / 2 / 1e3)  # between the steps too
    assert found.names == ["void ns::attend<64>(Params)"]


def test_the_commands_of_the_tools() -> None:
    names = ["void ns::attend<64, true>(Params)", "_forward_kernel", "void ns::attend<128, true>(Params)"]
    commands = tool_commands(names, LINE, "triton", Path("out"))
    ncu = shlex.join(commands["ncu"])
    assert "--kernel-name 'regex:^(_forward_kernel|attend)$'" in ncu
    assert f"-m attn profile --backend triton --once --steps 3 {LINE}" in ncu
    assert ncu.startswith("ncu --set full")
    assert "--trace cuda,nvtx" in shlex.join(commands["nsys"])
    assert "--kernel-name" not in tool_commands([], LINE, None, Path())["ncu"]
