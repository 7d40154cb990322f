"""Every feature of the CUDA kernels, forward and backward, against float64."""

from __future__ import annotations

import pytest
import torch

from attn.testing import Case, assert_case, cases
from attn.testing.matrix import DTYPES, SITUATIONS, situation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SITUATIONS)
def test_situation(name: str, dtype: torch.dtype) -> None:
    assert_case(situation(name, dtype), "cuda")


SMALL = {"sizes": (2, 3, 31, 33, 64, 65, 70), "head_dims": (1, 8, 17, 40, 64)}


@pytest.mark.parametrize("case", cases(40, 21, ops=("attention",), **SMALL), ids=str)
def test_random_call(case: Case) -> None:
    assert_case(case, "cuda")


@pytest.mark.parametrize("case", cases(15, 22, ops=("varlen",), **SMALL), ids=str)
def test_random_packed_call(case: Case) -> None:
    assert_case(case, "cuda")


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(200, 23, **SMALL), ids=str)
def test_more_random_calls(case: Case) -> None:
    assert_case(case, "cuda")
