"""Set-up shared by all tests: the number of threads, the seeds, no window for plots."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(2)  # sums split over another number of threads round differently


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generator is what code under test might use
    torch.manual_seed(0)
