"""The test of the tests: no honest result fails, planted defects are found as often as recorded, cases round-trip."""

from __future__ import annotations

import dataclasses
import json

import emulated
import planted
import pytest
import torch

from attn import reference
from attn.backends import base, load
from attn.operands import spec_of
from attn.spec import Operands
from attn.testing import (
    Case,
    Exact,
    Guarded,
    PoisonedEmpty,
    assert_case,
    assert_close,
    assert_forward,
    assert_gradients,
    assert_module_close,
    assert_verdicts,
    cases,
    compare,
    in_double,
    judge,
    oracle,
    run_case,
    spy,
    units,
)

HONEST_SEED = 31
SMALL = (1, 2, 3, 5, 8, 16, 17, 33)


def honest_cases() -> list[Case]:
    return cases(150, HONEST_SEED, ops=("attention", "varlen", "decode"), sizes=SMALL)


@pytest.mark.parametrize("part", range(5))
def test_the_reference_never_fails(part: int) -> None:
    for case in honest_cases()[part::5]:
        assert_case(case, "reference")


def without_weights(case: Case) -> Case:
    return dataclasses.replace(case, spec=case.spec._replace(weights=""))


@pytest.mark.parametrize("part", range(4))
def test_a_16_bit_kernel_never_fails(part: int) -> None:
    """Rounded where tensor cores round, keys in blocks, a shift that moves lazily."""
    for case in honest_cases()[part::4]:
        if case.spec.op != "attention" or not case.has_gradients:
            continue
        case = without_weights(case)
        x = case.operands()
        assert isinstance(x, Operands)
        d_out, d_lse, _ = case.gradients(x)
        assert_verdicts(judge(case, emulated.kernel(x, d_out, d_lse, case.spec.bias_grad)), case)


def test_pytorch_never_fails() -> None:
    served = 0
    for case in cases(200, HONEST_SEED + 1, sizes=SMALL):
        if case.kind in ("hidden_nan", "visible_nan") or load("sdpa").why_not(case.spec) is not None:
            continue
        assert_case(case, "sdpa")
        served += 1
    assert served >= 20


def test_planted_defects_are_found_as_often_as_recorded() -> None:
    recorded = json.loads(planted.POWER.read_text())
    for dtype in planted.DTYPES:
        for defect, (found, of) in planted.power(dtype).items():
            was_found, was_of = recorded[str(dtype).removeprefix("torch.")][defect]
            assert of == was_of, f"{defect}: the committed cases changed; run python tests/planted.py and compare"
            assert found >= was_found, f"{defect} in {dtype}: {found} of {of} found, {was_found} recorded"


def test_gross_defects_are_always_found() -> None:
    recorded = json.loads(planted.POWER.read_text())
    for rates in recorded.values():
        for defect in ("last key dropped", "causal off by one", "log of the row sum lost"):
            found, of = rates[defect]
            assert found == of > 0


def small_call() -> Operands:
    return Operands(torch.randn(1, 2, 4, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8), scale=0.3)


def test_a_nan_or_a_missing_dead_row_is_a_failure() -> None:
    x = small_call()._replace(query_lengths=torch.tensor([3], dtype=torch.int32))
    exact = oracle(x)
    out, m, l = reference.forward(x)
    assert_forward(exact, out, reference.lse_of(m, l))
    for value in (torch.nan, 1e-6, -torch.inf):
        wrong = out.clone()
        wrong[0, 0, 3, 0] = value
        with pytest.raises(AssertionError, match=r"worst at \[0, 0, 3, 0\]"):
            assert_forward(exact, wrong)
    with pytest.raises(AssertionError, match="lse"):
        assert_forward(exact, out, torch.zeros_like(m))
    with pytest.raises(AssertionError, match="shape"):
        assert_forward(exact, out[:, :1])


def test_a_vanished_nan_is_a_failure() -> None:
    x = small_call()
    x.q[0, 1, 2, 3] = torch.nan
    with pytest.raises(AssertionError, match="out"):
        assert_forward(oracle(x), torch.nan_to_num(reference.forward(x)[0]))


def test_verdicts_say_where_and_how_far() -> None:
    one = torch.ones(2, 2, dtype=torch.float64)
    verdict = compare("out", torch.tensor([[1.0, 1.0], [1.5, 1.0]]), Exact(one, one, one, one * 0))
    assert not verdict.passed
    assert "1 of 4 beyond the bound; worst at [1, 0]: 1.5, exact 1" in verdict.message
    with pytest.raises(AssertionError, match="the case line\nout"):
        assert_verdicts([verdict], "the case line")


def test_bounds_are_tight_for_rows_of_the_lowest_number() -> None:
    """The magnitude 3e38 of the mask must not widen the bound: it absorbs the score, and is exact."""
    x = small_call()._replace(bias=torch.full((1, 1, 4, 6), torch.finfo(torch.float32).min))
    exact = oracle(x)["out"]
    assert float(exact.bound(torch.float32).max()) < 1e-4


def test_gradients_without_an_output_gradient() -> None:
    x = small_call()
    residuals = reference.forward(x)
    d_lse = torch.randn(1, 2, 4)
    found = reference.backward(x, residuals, torch.zeros_like(residuals[0]), d_lse)
    assert_gradients(oracle(x, (None, d_lse, None)), *found[:3])


def test_tf32_widens_float32_alone() -> None:
    assert units(torch.float32, tf32=True)[0] == 2.0**-10
    assert units(torch.bfloat16, tf32=True) == units(torch.bfloat16)
    assert units(torch.float64) == units(torch.float64, tf32=True)


def test_module_comparison() -> None:
    exact = torch.randn(50, dtype=torch.float64)
    stock = exact.float()
    assert assert_module_close(exact.float(), exact, stock) <= 1
    with pytest.raises(AssertionError, match=r"d_weight: .* off by"):
        assert_module_close(stock + 1e-4, exact, stock, "d_weight")
    with pytest.raises(AssertionError, match="nan"):
        assert_module_close(torch.full_like(stock, torch.nan), exact, stock)
    noisy = stock + 1e-4
    assert assert_module_close(stock - 1e-4, exact, noisy) < 1, "as wrong as PyTorch is allowed"
    with pytest.raises(AssertionError, match="shape"):
        assert_module_close(stock[:3], exact, stock)


def test_closeness_of_two_computations() -> None:
    a = torch.randn(50)
    assert assert_close(a, a.double()) < 1
    assert assert_close(torch.empty(0), torch.empty(0)) == 0
    with pytest.raises(AssertionError, match="result"):
        assert_close(a, a + 1e-4)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(a, a[:4])


def test_cases_round_trip_and_repeat() -> None:
    drawn = honest_cases()
    assert drawn == honest_cases()
    for case in drawn:
        assert Case.parse(str(case)) == case
        first, second = case.operands(), case.operands()
        for a, b in zip(first, second, strict=True):
            assert a is b or a == b if not isinstance(a, torch.Tensor) else torch.equal(a.nan_to_num(), b.nan_to_num())


def test_cases_mean_what_their_spec_says() -> None:
    """The spec of a case is the one that the public functions build from its operands."""
    for case in cases(60, 3, ops=("attention", "varlen"), sizes=SMALL):
        x = case.operands()
        assert isinstance(x, Operands)
        x.q.requires_grad_()
        if x.bias is not None and case.spec.bias_grad:
            x.bias.requires_grad_()
        assert spec_of(x, case.spec.lse, case.spec.weights) == case.spec, case


def test_hidden_weights_of_a_row_with_nan_have_a_bound() -> None:
    """Averaged over the heads, a key hidden from such a row in one head alone still has a finite weight."""
    line = "attention cpu float32 head_dim=8 value_dim=8 keep weights=mean grad | B=2 Hq=2 Hkv=2 L=127 S=127"
    assert_case(Case.parse(f"{line} kind=visible_nan seed=1100098"), "reference")


def test_cases_cover_every_feature_and_kind() -> None:
    drawn = cases(300, 5, ops=("attention", "varlen", "decode"))
    for name in base.FEATURES:
        if name != "deterministic":
            assert any(getattr(c.spec, name) for c in drawn), name
    assert any(not c.spec.scale_positive for c in drawn)
    assert {c.kind for c in drawn} >= {"normal", "large", "shifted", "tiny", "dead", "finfo_min", "past_nan"}
    assert {c.kind for c in drawn} >= {"hidden_nan", "visible_nan"}
    assert len({c.layout for c in drawn}) == 6
    assert any(c.spec.value_dim != c.spec.head_dim for c in drawn)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("attention cpu float32 head_dim=8 value_dim=8", "no '|'"),
        ("attention cpu float32 head_dim=8 | B=2 C=3", "unknown field 'C=3'"),
        ("attention cpu float32 head_dim=8 | B=two", "'B=two' needs int"),
        ("attention cpu float32 head_dim=8 | Hq=4 Hkv=2", "grouped=False"),
        ("attention cpu float32 head_dim=8 band=start | L=3", "band='start'"),
        ("attention cpu float32 head_dim=8 | layout=diagonal", "layout=diagonal; known"),
        ("attention cpu float32 head_dim=8 | kind=odd", "kind=odd; known"),
        ("attention cpu float32 head_dim=8 | kind=finfo_min", "needs one of: bias"),
        ("attention cpu float32 key_lengths | kind=past_nan layout=broadcast", "other sequences"),
    ],
)
def test_wrong_case_lines(line: str, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("|", r"\|")):
        Case.parse(line)


def test_in_double_changes_dtypes_alone() -> None:
    x = small_call()
    y = in_double(x)
    assert y.q.dtype == torch.float64
    assert torch.equal(y.q.float(), x.q)
    assert y.scale == x.scale


def test_a_refused_case_says_why() -> None:
    case = Case.parse("attention cpu float32 head_dim=8 value_dim=8 softcap grad | B=1 Hq=1 Hkv=1 L=3 S=3")
    with pytest.raises(RuntimeError, match="sdpa refuses: does not do softcap"):
        run_case(case, "sdpa")


def test_spy_sees_passes_and_nests() -> None:
    with spy() as outer:
        base.record("reference", "forward")
        with spy() as inner:
            base.record("sdpa", "call")
        base.record("reference", "backward")
    base.record("reference", "decode")
    assert outer == [("reference", "forward"), ("sdpa", "call"), ("reference", "backward")]
    assert inner == [("sdpa", "call")]
    assert not base.observers


def test_poisoned_memory() -> None:
    with PoisonedEmpty():
        made = [
            torch.empty(3),
            torch.ones(2).new_empty(3),
            torch.empty_like(torch.ones(3)),
            torch.empty_strided((2,), (3,)),
        ]
        whole = torch.empty(2, dtype=torch.int32)
        filled = torch.zeros(3) + torch.ones(3)
    assert all(t.isnan().all() for t in made)
    assert (whole == torch.iinfo(torch.int32).max).all()
    assert torch.equal(filled, torch.ones(3))


@pytest.mark.parametrize(
    "make", [lambda: torch.randn(3, 4), lambda: torch.randn(4, 3).t(), lambda: torch.randn(1, 4).expand(3, 4)]
)
def test_guards_keep_values_and_strides_and_see_writes(make: object) -> None:
    t = make()  # type: ignore[operator]
    guard = Guarded()
    copy = guard.copy(t)
    assert torch.equal(copy, t)
    assert copy.stride() == t.stride()
    guard.assert_intact()
    copy.as_strided((1,), (1,), copy.storage_offset() - 1).fill_(0.0)
    with pytest.raises(AssertionError, match="before buffer 0"):
        guard.assert_intact()
