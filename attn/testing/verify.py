"""Every backend against float64 on this machine: the feature matrix in each dtype, and the conservation laws.

A cell is one call on one backend. It runs, and then holds the worst error in units of what is allowed; or it is refused
by the backend's own sentence; or it failed. Nothing is raised: a crash in a kernel is an answer too.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch

from attn.backends import BACKENDS, load
from attn.backends.proven import Entry, passes
from attn.spec import AttentionSpec, Operands, arch_of
from attn.testing import laws, matrix
from attn.testing.cases import Case, cases
from attn.testing.run import judge, run_case
from attn.testing.tolerance import Verdict

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAWS = ("causal", "lengths", "bias", "documents_causal")
"""Situations whose laws are checked at LAW_LENGTH, where no reference is needed."""
LAW_LENGTH = 300
DEEP_LENGTHS = (1, 127, 128, 129, 255, 257, 500, 640, 1024)
DEEP_HEAD_DIMS = (16, 32, 64, 80, 96, 100, 128, 160, 192, 256)
DEEP_CASES = {"attention": 40, "varlen": 12, "decode": 12}
"""Random calls for each backend and dtype."""


@dataclass(frozen=True)
class Cell:
    """One call on one backend. `name` is its row in the table, `case` what can be given back to `verify`."""

    backend: str
    name: str
    case: Case
    worst: float = 0.0
    """The largest error over what is allowed; infinite where the call crashed or NaN did not match."""
    message: str = ""
    """Why the backend refused, or what was wrong."""
    refused: bool = False

    @property
    def passed(self) -> bool:
        """Whether it ran and every error was allowed."""
        return not self.refused and self.worst <= 1

    @property
    def failed(self) -> bool:
        """Whether it ran and some error was not."""
        return not self.refused and self.worst > 1


@dataclass(frozen=True)
class Check:
    """A cell to be: what to run on which backend."""

    backend: str
    name: str
    case: Case
    by_laws: bool = False

    def run(self) -> Cell:
        """Run and judge it; whatever a kernel raises is a failed cell."""
        reason = load(self.backend).why_not(self.case.spec)
        if reason is not None:
            return Cell(self.backend, self.name, self.case, message=reason, refused=True)
        try:
            verdicts = _laws(self.case, self.backend) if self.by_laws else _judged(self.case, self.backend)
        except Exception as error:  # a kernel may raise anything, and the other cells are still worth knowing
            last = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
            return Cell(self.backend, self.name, self.case, math.inf, said)
        worst = max((max(v.ratio, v.rmse) for v in verdicts), default=0.0)
        return Cell(self.backend, self.name, self.case, worst, "; ".join(v.message for v in verdicts if not v.passed))


def devices() -> tuple[str, ...]:
    """Where tensors can lie here: the GPU first."""
    return ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)


def checks(backends: tuple[str, ...] = (), deep: bool = False) -> Iterator[Check]:
    """What there is to run for these backends, all that work here by default."""
    for device in devices():
        arch = arch_of(device, None)
        for name in backends or tuple(BACKENDS):
            if load(name).missing is not None or load(name).why_not(_plain(device, arch)) is not None:
                continue
            if not backends and load(name).only_forced(_plain(device, arch)):
                continue
            yield from _of(name, {"device": device, "arch": arch}, deep)


def _of(backend: str, where: dict[str, str], deep: bool) -> Iterator[Check]:
    dtypes = [d for d in DTYPES if d in load(backend).capability.dtypes]
    whole = load(backend).whole_call  # no lse, no passes
    for name in matrix.SITUATIONS:
        for dtype in dtypes:
            yield Check(backend, name, matrix.situation(name, dtype, **where, **({"lse": False} if whole else {})))
    for name in LAWS if not whole else ():
        for dtype in dtypes:
            case = matrix.situation(name, dtype, **where, L=LAW_LENGTH, S=LAW_LENGTH, kind="normal")
            yield Check(backend, f"laws: {name}", case, by_laws=True)
    if deep:
        for op, count in DEEP_CASES.items():
            for dtype in dtypes:
                some = {"ops": (op,), "dtypes": (dtype,), "sizes": DEEP_LENGTHS, "head_dims": DEEP_HEAD_DIMS}
                for case in cases(count, 1, device=where["device"], **some):  # type: ignore[arg-type]
                    spec = case.spec._replace(arch=where["arch"])
                    yield Check(backend, f"random {op}", replace(case, spec=spec))


def replay(line: str, backends: tuple[str, ...] = ()) -> Iterator[Check]:
    """The case of a line on these backends, or on all that work here. Raises ValueError for a line that is wrong."""
    case = Case.parse(line)
    for name in backends or tuple(BACKENDS):
        if load(name).missing is None and (backends or not load(name).only_forced(case.spec)):
            yield Check(name, "case", case)


def verdict_of_passes(cells: list[Cell]) -> tuple[set[Entry], set[Entry]]:
    """(proven, broken) passes on a GPU: those of which every cell ran right, and those of which some did not."""
    good: set[Entry] = set()
    bad: set[Entry] = set()
    for cell in cells:
        spec = cell.case.spec
        if spec.device == "cuda" and load(cell.backend).needs_proof and not cell.refused:
            entries = {(cell.backend, spec.arch, spec.dtype, p) for p in passes(spec)}
            (bad if cell.failed else good).update(entries)
    return good - bad, bad


def _plain(device: str, arch: str) -> AttentionSpec:
    return AttentionSpec(device=device, arch=arch, head_dim=64, value_dim=64)


def _judged(case: Case, backend: str) -> list[Verdict]:
    results = run_case(case, backend)
    with _one_thread():
        return judge(case, results)


def _laws(case: Case, backend: str) -> list[Verdict]:
    x = cast(Operands, case.operands())  # LAWS has no decoding steps
    with _one_thread():
        return laws.check(backend, x, case.gradients(x)[0], bias_grad=case.spec.bias_grad)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small tensors in float64 are slower on many threads, ten times so where the machine has other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(planned: list[Check], seen: Callable[[Cell], None]) -> list[Cell]:
    """Run all checks, telling `seen` of each cell."""
    cells = []
    for check in planned:
        cells.append(check.run())
        seen(cells[-1])
    return cells
