"""Running a case on a backend and holding all of its results against the oracle."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attn import reference
from attn.backends import load
from attn.backends.base import Backend
from attn.spec import AttentionSpec, DecodeOperands, Operands
from attn.testing.cases import Case
from attn.testing.observe import PoisonedEmpty
from attn.testing.oracle import NO_GRADIENTS, Gradients, oracle
from attn.testing.tolerance import Exact, Verdict, assert_verdicts, coarsest, compare


@dataclass
class Results:
    """What a call gave. Whole-call backends leave lse, m, l and weights out."""

    out: Tensor
    lse: Tensor | None = None
    m: Tensor | None = None
    l: Tensor | None = None
    weights: Tensor | None = None
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    d_bias: Tensor | None = None


def run_case(case: Case, backend: str, backward: str | None = None, poisoned: bool = True) -> Results:
    """The case on one backend, with the backward pass of another if named; no check of any kind.

    `poisoned` fills uninitialised tensors with NaN first. Raises RuntimeError where a backend refuses the case.
    """
    x = case.operands()
    engines = [load(backend)] + ([load(backward)] if backward else [])
    for engine in engines:
        reason = engine.why_not(case.spec)
        if reason is not None:
            raise RuntimeError(f"{engine.name} refuses: {reason}")
    if isinstance(x, DecodeOperands):
        with _poison(poisoned):
            out, lse = engines[0].decode(x)
        return Results(out, lse)
    gradients = case.gradients(x) if case.has_gradients else NO_GRADIENTS
    if engines[0].whole_call:
        return _whole(engines[0], case.spec, x, gradients[0])
    with _poison(poisoned):
        return _passes(engines[0], engines[-1], case.spec, x, gradients)


def judge(case: Case, results: Results, x: Operands | DecodeOperands | None = None) -> list[Verdict]:
    """Hold results against the oracle; nothing is raised. `x` where the operands are not quite the case's own."""
    x = case.operands() if x is None else x
    gradients = NO_GRADIENTS
    if isinstance(x, Operands) and results.dq is not None:
        gradients = case.gradients(x)
    exact = oracle(x, gradients, case.spec.weights if results.weights is not None else "")
    tf32 = case.spec.device == "cuda" and torch.backends.cuda.matmul.allow_tf32
    verdicts = []
    for name in ("out", "lse", "weights", "dq", "dk", "dv", "d_bias"):
        found = getattr(results, name)
        if found is not None:
            gate = case.gated and name not in ("lse", "weights")
            dtype = coarsest(x.q, found) if name == "d_bias" else None
            verdicts.append(compare(name, found, exact[name], gate, tf32, dtype))
    if results.m is not None and results.l is not None:
        verdicts += judge_residuals(exact, results.m, results.l, tf32)
    return verdicts


def judge_residuals(exact: dict[str, Exact], m: Tensor, l: Tensor, tf32: bool = False) -> list[Verdict]:
    """m at most 8 ln 2 below the row's largest score and not above it; l the sum of exp(s - m)."""
    top = exact["m"]
    shift = torch.where(top.value == m, 0.0, m.double() - top.value)
    beyond = shift.clamp(min=0) + (-8 * math.log(2) - shift).clamp(min=0)
    inside = dataclasses.replace(top, value=torch.where(top.value.isnan(), top.value, 0.0))
    row_sum = l.double() * shift.exp()
    return [
        compare("m", beyond.to(m.dtype), inside, tf32=tf32),
        compare("l", row_sum.to(l.dtype), exact["l"], tf32=tf32),
    ]


def check(case: Case, backend: str, backward: str | None = None) -> list[Verdict]:
    """Run and judge a case."""
    return judge(case, run_case(case, backend, backward))


def assert_case(case: Case, backend: str, backward: str | None = None) -> list[Verdict]:
    """Run and judge a case; raises AssertionError headed by the case line where a bound is broken."""
    verdicts = check(case, backend, backward)
    assert_verdicts(verdicts, f"{case}   [{backend}{' + ' + backward if backward else ''}]")
    return verdicts


def _poison(on: bool) -> contextlib.AbstractContextManager[object]:
    return PoisonedEmpty() if on else contextlib.nullcontext()  # type: ignore[no-untyped-call]


def _passes(first: Backend, second: Backend, spec: AttentionSpec, x: Operands, gradients: Gradients) -> Results:
    if spec.weights:
        out, m, l, weights = first.forward_weights(x, spec.weights == "mean")
    else:
        out, m, l = first.forward(x)
        weights = None
    results = Results(out, reference.lse_of(m, l), m, l, weights)
    d_out, d_lse, d_weights = gradients
    if d_out is not None:
        grads = second.backward(x, (out, m, l), d_out, d_lse, d_weights, spec.bias_grad)
        results.dq, results.dk, results.dv, d_bias = grads
        results.d_bias = d_bias if spec.bias_grad else None
    return results


def _whole(engine: Backend, spec: AttentionSpec, x: Operands, d_out: Tensor | None) -> Results:
    if d_out is None:
        return Results(engine.call(spec, x))
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
    if x.bias is not None and spec.bias_grad:
        leaves.append(x.bias.detach().requires_grad_())
    out = engine.call(spec, x._replace(**dict(zip(("q", "k", "v", "bias"), leaves, strict=False))))  # type: ignore[arg-type]
    grads = torch.autograd.grad(out, leaves, d_out)
    named = dict(zip(("dq", "dk", "dv", "d_bias"), grads, strict=False))
    return Results(out.detach(), **named)
