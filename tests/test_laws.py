"""The conservation laws: they hold on every backend with passes of its own, and break where something is wrong."""

from __future__ import annotations

import pytest
import torch

from attn import planner, reference
from attn.backends import load
from attn.spec import Operands
from attn.testing import Verdict, assert_verdicts, cases, laws, run_case

BACKENDS = [n for n in planner.names() if load(n).available() is None and not load(n).whole_call]
SIZES = (1, 2, 3, 5, 8, 16, 17, 33)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", range(4))
def test_all_laws_on_random_cases(backend: str, part: int) -> None:
    checked = 0
    for case in cases(80, 9, sizes=SIZES)[part::4]:
        if not case.has_gradients or case.kind == "finfo_min" or load(backend).why_not(case.spec) is not None:
            continue
        x = case.operands()
        assert isinstance(x, Operands)
        d_out = case.gradients(x)[0].nan_to_num(0.0, 0.0, 0.0)
        assert_verdicts(laws.check(backend, x, d_out, bias_grad=case.spec.bias_grad), case)
        checked += 1
    assert checked


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_gradient_of_lowest_rows(backend: str) -> None:
    """The law that finds the CPU kernel of PyTorch: rows of finfo.min weigh 1 / N, not 1."""
    bias = torch.full((1, 1, 8, 16), torch.finfo(torch.float32).min)
    x = Operands(torch.randn(1, 1, 8, 4), torch.randn(1, 1, 16, 4), torch.randn(1, 1, 16, 4), bias=bias)
    engine = load(backend)
    out, m, l = engine.forward(x)
    d_out = torch.ones_like(out)
    dv = engine.backward(x, (out, m, l), d_out, None, None, False)[2]
    x = x._replace(bias=None)  # its magnitude would only widen the bound
    assert_verdicts([laws.values_gradient(x, dv, d_out, l)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_mean_of_a_long_sequence(backend: str, dtype: torch.dtype) -> None:
    n = 200
    v = torch.randn(1, 2, n, 8).to(dtype)
    x = Operands(torch.zeros(1, 2, n, 8, dtype=dtype), torch.randn(1, 2, n, 8).to(dtype), v, right=0)
    assert_verdicts([laws.running_mean(x, load(backend).forward(x)[0])])


def call() -> tuple[Operands, torch.Tensor]:
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 13, 8), torch.randn(2, 2, 13, 8)
    return Operands(q, k, v, bias=torch.randn(2, 4, 9, 13), scale=0.35), torch.randn(2, 4, 9, 8)


def broken(name: str) -> Verdict:
    """The law's verdict on results with one planted defect."""
    x, d_out = call()
    out, m, l = reference.forward(x)
    dq, dk, dv, _ = reference.backward(x, (out, m, l), d_out, needs_bias_grad=True)
    ones = x._replace(v=torch.ones_like(x.v))
    match name:
        case "a key without its dv":
            dv[0, 0, 5] = 0
            return laws.values_gradient(x, dv, d_out, l)
        case "a stale row sum":
            worse = reference.backward(x, (out, m, l * 1.01), d_out, needs_bias_grad=True)
            assert worse[3] is not None
            return laws.bias_rows(x, worse[3], d_out)
        case "dq off by 1 %":
            return laws.products(x, dq * 1.01, dk, d_out)
        case "dk in the wrong scale":
            return laws.products(x, dq, dk / x.scale, d_out)
        case "a row not normalised":
            wrong = reference.forward(ones)[0].clone()
            wrong[1, 2, 3] *= 1.001
            return laws.unit_values(ones, wrong, l)
        case "a mask off by one":
            causal = x._replace(q=torch.zeros_like(x.q), bias=None, right=1)
            return laws.running_mean(causal, reference.forward(causal)[0])
        case _:
            weights = reference.weights(x, m, l, False)
            weights[0, 1, 2, 12] = 0
            return laws.weight_sums(x, weights, l)


@pytest.mark.parametrize(
    "name",
    [
        "a key without its dv",
        "a stale row sum",
        "dq off by 1 %",
        "dk in the wrong scale",
        "a row not normalised",
        "a mask off by one",
        "a weight lost",
    ],
)
def test_each_law_finds_its_defect(name: str) -> None:
    assert not broken(name).passed


def test_bias_rows_with_a_gradient_of_the_lse() -> None:
    x, d_out = call()
    residuals = reference.forward(x)
    d_lse = torch.randn(2, 4, 9)
    d_bias = reference.backward(x, residuals, d_out, d_lse, needs_bias_grad=True)[3]
    assert d_bias is not None
    assert_verdicts([laws.bias_rows(x, d_bias, d_out, d_lse)])


def test_laws_hold_between_backends_too() -> None:
    """The forward of one with the backward of another: residuals are one contract."""
    for case in cases(20, 12, sizes=SIZES):
        if case.has_gradients and not case.spec.dropout and case.kind == "normal":
            for first in BACKENDS:
                for second in BACKENDS:
                    if any(load(n).why_not(case.spec) is not None for n in (first, second)):
                        continue
                    results = run_case(case, first, second)
                    x = case.operands()
                    assert isinstance(x, Operands)
                    assert results.l is not None
                    assert results.dv is not None
                    assert_verdicts([laws.values_gradient(x, results.dv, case.gradients(x)[0], results.l)], case)
