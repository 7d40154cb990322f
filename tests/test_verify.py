"""`python -m attn verify`: what passes, what is caught, what is printed, and the stamp that it leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from attn import native, user_cache
from attn.backends import load, proven
from attn.backends.base import Forward
from attn.backends.reference import ReferenceBackend
from attn.cli import main
from attn.spec import AttentionSpec, Operands
from attn.testing import Case, matrix, verify

LINE = "attention cpu float32 head_dim=16 value_dim=16 band=start causal grad | B=1 Hq=2 Hkv=2 L=9 S=9 right=0 seed=3"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    proven.stamped.cache_clear()
    yield tmp_path
    proven.stamped.cache_clear()


def test_all_backends_pass(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    assert main(["verify", "--json", str(tmp_path / "cells.json")]) == 0
    said = capsys.readouterr().out
    cells = json.loads((tmp_path / "cells.json").read_text())
    assert {c["name"] for c in cells} >= set(matrix.SITUATIONS) | {f"laws: {name}" for name in verify.LAWS}
    ran = {(c["backend"], c["name"]) for c in cells if not c["refused"]}
    own = ["reference"] + (["cpu"] if native.load() is None else [])
    assert ran >= {(backend, name) for backend in own for name in matrix.SITUATIONS}
    assert ("sdpa", "causal") in ran
    assert all(c["message"] for c in cells if c["refused"])
    assert not any(c["failed"] for c in cells)
    assert "all right" in said
    assert "No GPU kernel was checked" in said
    assert torch.get_num_threads() == threads
    assert not user_cache.path(proven.STAMPS).exists()


def test_a_wrong_kernel_is_caught_and_its_case_can_be_replayed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ReferenceBackend.forward

    def wrong(self: ReferenceBackend, x: Operands) -> Forward:
        out, m, l = right(self, x)
        return (out * 1.001 if x.softcap else out), m, l

    monkeypatch.setattr(ReferenceBackend, "forward", wrong)
    assert main(["verify", "--backend", "reference"]) == 1
    said = capsys.readouterr().out
    assert "FAILED on reference: out float32" in said
    table = {line.split()[0]: line for line in said.splitlines() if line.startswith("  ")}
    assert "FAILED" in table["softcap"]
    assert "FAILED" not in table["causal"]
    line = said.partition('--backend reference "')[2].partition('"')[0]
    assert Case.parse(line).spec.softcap
    assert main(["verify", "--backend", "reference", line]) == 1
    monkeypatch.undo()
    assert main(["verify", "--backend", "reference", line]) == 0


def test_a_crash_is_a_failure_and_the_rest_still_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(ReferenceBackend, "decode", crash)
    assert main(["verify", "--backend", "reference"]) == 1
    said = capsys.readouterr().out
    assert "RuntimeError: no such instruction" in said
    failing = [line.split()[0] for line in said.splitlines() if line.startswith("  decode") and "FAILED" in line]
    assert failing == ["decode", "decode_grouped", "decode_window", "decode_paged"]


def test_one_case_on_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *LINE.split()]) == 0
    said = capsys.readouterr().out
    assert "sdpa" in said
    assert "reference" in said
    assert "triton" not in said  # runs CPU tensors in an interpreter at best, and only when asked


def test_a_refusal_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    line = LINE.replace("grad |", "dropout grad |")
    assert main(["verify", "--backend", "sdpa", line]) == 0
    assert "does not do dropout" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--backend", "fast"], "fast"),
        (["attention"], "no '|'"),
        ([LINE.replace("Hq=2", "Hq=3")], "grouped"),
        ([LINE, "--backend", "triton"], "triton"),
    ],
)
def test_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], word: str) -> None:
    if "triton" in arguments and load("triton").missing is None:
        pytest.skip("Triton works here")
    assert main(["verify", *arguments]) == 2
    assert word in capsys.readouterr().err


def test_deep_adds_random_calls_at_real_lengths() -> None:
    plain, deep = (list(verify.checks(("reference",), deep)) for deep in (False, True))
    more = [check for check in deep if check.name.startswith("random ")]
    assert len(deep) == len(plain) + len(more)
    assert {check.case.spec.op for check in more} == set(verify.DEEP_CASES)
    assert max(check.case.S for check in more) >= 500


ON_GPU = AttentionSpec(device="cuda", arch="sm_90", dtype=torch.bfloat16, head_dim=64, value_dim=64, grad=True)


def cell(worst: float, spec: AttentionSpec = ON_GPU, refused: bool = False) -> verify.Cell:
    return verify.Cell("triton", "full", Case(spec), worst, refused=refused)


def test_what_is_proven_by_cells() -> None:
    forward, backward = (("triton", "sm_90", torch.bfloat16, p) for p in ("forward", "backward"))
    assert verify.verdict_of_passes([cell(0.5), cell(0.9)]) == ({forward, backward}, set())
    assert verify.verdict_of_passes([cell(0.5), cell(1.5)]) == (set(), {forward, backward})
    assert verify.verdict_of_passes([cell(0.5), cell(1.5, ON_GPU._replace(op="decode"))]) == (
        {forward, backward},
        {("triton", "sm_90", torch.bfloat16, "decode")},
    )
    assert verify.verdict_of_passes([cell(0.0, refused=True)]) == (set(), set())
    assert verify.verdict_of_passes([cell(0.5, ON_GPU._replace(device="cpu"))]) == (set(), set())


def test_a_stamp_makes_a_kernel_the_automatic_choice_on_this_machine_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [("triton", "sm_90", torch.bfloat16, p) for p in ("forward", "backward")]
    said = proven.why_not("triton", ON_GPU)
    assert said is not None
    assert "python -m attn verify" in said
    assert proven.stamp(entries, [])
    assert proven.why_not("triton", ON_GPU) is None
    assert proven.why_not("triton", ON_GPU._replace(dtype=torch.float16)) is not None
    assert proven.why_not("triton", ON_GPU._replace(arch="sm_80")) is not None
    file = user_cache.path(proven.STAMPS)
    assert file.stat().st_mode & 0o777 == 0o600
    assert proven.stamp([], entries[1:])
    assert proven.why_not("triton", ON_GPU._replace(grad=False)) is None
    assert proven.why_not("triton", ON_GPU) is not None
    monkeypatch.setattr(proven, "_driver", lambda: "another driver")
    proven.stamped.cache_clear()
    assert proven.why_not("triton", ON_GPU._replace(grad=False)) is not None


@pytest.mark.parametrize("content", ["{not json", "[]", '{"x": 3}', "HERE: 3", 'HERE: [["triton"], 4, null]'])
def test_a_spoilt_stamp_file_proves_nothing(home: Path, content: str) -> None:
    file = user_cache.path(proven.STAMPS)
    file.parent.mkdir(parents=True)
    if content.startswith("HERE: "):
        content = f"{{{json.dumps(proven.machine())}: {content.removeprefix('HERE: ')}}}"
    file.write_text(content)
    proven.stamped.cache_clear()
    assert proven.why_not("triton", ON_GPU) is not None
    assert proven.stamp([("triton", "sm_90", torch.bfloat16, "forward")], [])
    assert proven.why_not("triton", ON_GPU._replace(grad=False)) is None


def test_a_changed_kernel_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    before = proven.machine()
    original = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: original(self) + b"#")
    assert proven.machine() != before


@pytest.mark.slow
def test_the_stamp_is_asked_for_while_compiling() -> None:
    """torch.compile plans a call while it traces, and must not trace the reading of a file."""
    entry = ("triton", "sm_90", torch.bfloat16, "forward")

    def planned(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if proven.why_not("triton", ON_GPU._replace(grad=False)) is None else x

    x = torch.zeros(2)
    assert torch.equal(torch.compile(planned, backend="eager", fullgraph=True)(x), x)
    proven.stamp([entry], [])
    torch.compiler.reset()
    assert torch.equal(torch.compile(planned, backend="eager", fullgraph=True)(x), x + 1)
