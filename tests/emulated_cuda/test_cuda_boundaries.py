"""Sizes at the boundaries of the kernels' predicates, with copies that arrive late or early, warps in other orders and
shared memory in other places; and no ldmatrix that meets a bank conflict."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cuda_host.control import Emulator
from cuda_host.lines import made
from cuda_host.subjects import SUBJECTS

from attn import native_cuda
from attn.testing import assert_case

CASES = sorted({case for subject in SUBJECTS.values() for case in subject.cases})


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    found = Emulator(native_cuda.path())
    yield found
    found.set()


@pytest.mark.parametrize("turn", range(len(CASES)), ids=CASES)
def test_boundary(turn: int, emulator: Emulator) -> None:
    launches, conflicts = emulator.launches, emulator.bank_conflicts
    emulator.vary(turn)
    assert_case(made(CASES[turn]), "cuda")
    assert emulator.launches > launches
    assert emulator.bank_conflicts == conflicts
