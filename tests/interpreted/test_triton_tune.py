"""ATTN_AUTOTUNE=1 finds a tile once, keeps it where only the user can read it, and changes no result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from attn import user_cache
from attn.backends import load
from attn.spec import Operands
from attn.testing import assert_close
from attn.triton_kernels import arguments, config, tune


@pytest.fixture
def tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTN_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "ROUNDS", 1)
    monkeypatch.setattr(config, "TUNED", {})
    monkeypatch.setitem(tune._state, "loaded", False)
    arguments.plans.clear()
    yield user_cache.path(tune.FILE)
    arguments.plans.clear()


def test_tuning(tuning: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = Operands(torch.randn(1, 1, 20, 8), torch.randn(1, 1, 24, 8), torch.randn(1, 1, 24, 8))
    backend = load("triton")
    out, m, l = backend.forward(x)
    gradients = backend.backward(x, (out, m, l), out, None, None, False)
    found = json.loads(tuning.read_text())
    assert {key.split()[-4] for key in found} == {"forward", "keys", "queries"}
    assert tuning.stat().st_mode & 0o777 == 0o600
    assert tuning.parent.stat().st_mode & 0o077 == 0

    def never(*args: object) -> None:
        raise AssertionError("timed again")

    monkeypatch.setattr(tune, "_seconds", never)
    arguments.plans.clear()
    config.TUNED.clear()
    monkeypatch.setitem(tune._state, "loaded", False)
    assert torch.equal(backend.forward(x)[0], out)
    monkeypatch.delenv("ATTN_AUTOTUNE")
    config.TUNED.clear()
    arguments.plans.clear()
    assert_close(backend.forward(x)[0], out)
    for a, b in zip(backend.backward(x, (out, m, l), out, None, None, False)[:3], gradients[:3], strict=True):
        assert_close(a, b)


def test_a_broken_cache_is_no_failure(tuning: Path) -> None:
    tuning.parent.mkdir(parents=True)
    tuning.write_text("{not json")
    x = Operands(*(torch.randn(1, 1, 4, 8) for _ in range(3)))
    assert bool(load("triton").forward(x)[0].isfinite().all())
    assert len(json.loads(tuning.read_text())) == 1


def test_neighbours_are_tiles_that_kernels_take() -> None:
    for t in tune.neighbours(config.Tile(128, 64, 8, 2, 128)):
        assert 16 <= t.rows <= 128
        assert 16 <= t.keys <= 128
        assert t.warps in (4, 8)
        assert t.stages >= 1
