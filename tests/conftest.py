"""Set-up shared by all tests: the number of threads, the seeds, no window for plots."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).parent))  # helper modules lie beside the tests
torch.set_num_threads(1)  # small tensors are slower on two, and sums split over threads round differently


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest --case "LINE"` replays cases instead of running the tests."""
    parser.addoption("--case", action="append", default=[], metavar="LINE", help="replay this case on every backend")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--case` only the replay runs, without it everything else."""
    replay = bool(config.getoption("--case"))
    items[:] = [item for item in items if item.name.startswith("test_replayed_case[") == replay]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generator is what code under test might use
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """Leaves the number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
