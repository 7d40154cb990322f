"""Every backend that works here, on random calls of every kind: a new backend is tested by being listed."""

from __future__ import annotations

import pytest
import torch

import attn
from attn import planner, reference
from attn.backends import load
from attn.spec import DecodeOperands, Operands
from attn.testing import Case, Guarded, assert_case, assert_close, cases, check, run_case, spy

AVAILABLE = [n for n in planner.names() if load(n).available() is None and "cpu" in load(n).capability.devices]
BY_PASSES = [n for n in AVAILABLE if not load(n).whole_call]
OPS = ("attention", "varlen", "decode")
PYTORCHS_NAN = ("hidden_nan", "visible_nan")
"""What whole-call backends are not held to: NaN is treated there as PyTorch treats it."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case_line" in metafunc.fixturenames:
        metafunc.parametrize("case_line", metafunc.config.getoption("--case"))


def test_replayed_case(case_line: str) -> None:
    """`pytest --case "LINE"`: the line on every backend that takes it."""
    case = Case.parse(case_line)
    served = [n for n in planner.names() if load(n).why_not(case.spec) is None]
    assert served, "\n".join(f"{n}: {load(n).why_not(case.spec)}" for n in planner.names())
    for backend in served:
        assert_case(case, backend)


def sizes_for(backend: str) -> tuple[int, ...]:
    """Lengths at and beside the edges of the backend's tile, as long as they stay small, and a few odd ones."""
    edges = {n + d for n in load(backend).tile(Case.parse("attention cpu float32 | B=1").spec) for d in (-1, 0, 1)}
    return tuple(sorted({1, 2, 3, 5, 17, 33} | {n for n in edges if 0 < n <= 65}))


@pytest.mark.parametrize("part", range(6))
@pytest.mark.parametrize("backend", AVAILABLE)
def test_random_cases(backend: str, part: int) -> None:
    engine = load(backend)
    for case in cases(120, 41, ops=OPS, sizes=sizes_for(backend))[part::6]:
        if engine.whole_call and case.kind in PYTORCHS_NAN:
            continue
        reason = engine.why_not(case.spec)
        if reason is None:
            assert_case(case, backend)
        else:
            with pytest.raises(RuntimeError, match=r"refuses"):
                run_case(case, backend)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_the_random_cases_reach_it(backend: str) -> None:
    drawn = cases(120, 41, ops=OPS, sizes=sizes_for(backend))
    assert sum(load(backend).why_not(case.spec) is None for case in drawn) >= 3


@pytest.mark.parametrize("first", BY_PASSES)
@pytest.mark.parametrize("second", BY_PASSES)
def test_the_forward_of_one_feeds_the_backward_of_another(first: str, second: str) -> None:
    served = 0
    for case in cases(30, 43, ops=("attention", "varlen"), sizes=(1, 3, 8, 17, 33)):
        if case.has_gradients and all(load(n).why_not(case.spec) is None for n in (first, second)):
            assert_case(case, first, second)
            served += 1
    assert served


@pytest.mark.parametrize("backend", BY_PASSES)
def test_dropout_bits_are_the_references(backend: str) -> None:
    """v = 1 at one key and 0 elsewhere: out is 0 exactly where the generator drops that key."""
    for case in cases(40, 47, sizes=(3, 8, 17, 33)):
        if not case.spec.dropout or case.kind != "normal" or load(backend).why_not(case.spec) is not None:
            continue
        x = case.operands()
        assert isinstance(x, Operands)
        values = torch.zeros_like(x.v)
        values[:, :, case.S // 2] = 1
        x = x._replace(v=values)
        assert torch.equal(load(backend).forward(x)[0] != 0, reference.forward(x)[0] != 0), case


@pytest.mark.parametrize("backend", BY_PASSES)
def test_nothing_is_written_around_the_inputs(backend: str) -> None:
    for case in cases(24, 53, ops=OPS, sizes=(1, 3, 17, 33)):
        if load(backend).why_not(case.spec) is not None:
            continue
        x = case.operands()
        guard = Guarded()
        copies = [guard.copy(t) if isinstance(t, torch.Tensor) and t.numel() else t for t in x]
        before = [t.clone() if isinstance(t, torch.Tensor) else t for t in copies]
        engine = load(backend)
        if isinstance(x, DecodeOperands):
            engine.decode(DecodeOperands(*copies))
        else:
            y = Operands(*copies)
            residuals = engine.forward(y)
            if case.has_gradients:
                engine.backward(y, residuals, *case.gradients(y), case.spec.bias_grad)
        guard.assert_intact()
        for old, new in zip(before, copies, strict=True):
            if isinstance(new, torch.Tensor):
                assert torch.equal(old.nan_to_num(), new.nan_to_num()), case  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", AVAILABLE)
def test_repeats_and_other_batch_orders_are_bitwise_equal(backend: str) -> None:
    for case in cases(30, 59, sizes=(3, 8, 17, 33)):
        if load(backend).why_not(case.spec) is not None or case.kind in PYTORCHS_NAN:
            continue
        a, b = run_case(case, backend), run_case(case, backend)
        for name in ("out", "dq", "dk", "dv"):
            one, other = getattr(a, name), getattr(b, name)
            assert one is None or torch.equal(one, other), (case, name)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_public_calls_run_where_they_are_sent(backend: str) -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 16)
    with spy() as calls:
        out = attn.attention(q, k, v, mask=attn.masks.causal(), backend=backend)
    assert {name for name, _ in calls} <= {backend}
    assert_close(out, reference.forward(Operands(q.double(), k.double(), v.double(), right=0, scale=0.25))[0])


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("sizes", ["B=0 L=3 S=3", "B=1 L=0 S=3", "B=2 L=3 S=0", "B=1 L=1 S=1"])
@pytest.mark.parametrize("features", ["", "band=end causal", "key_lengths"])
def test_empty_and_single_sizes(backend: str, sizes: str, features: str) -> None:
    right = " right=0" if features.startswith("band") else ""
    line = f"attention cpu float32 head_dim=8 value_dim=8 {features} grad | Hq=4 Hkv=4 {sizes}{right}"
    assert all(v.passed for v in check(Case.parse(line), backend))
