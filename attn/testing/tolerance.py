"""How wrong a result may be: the one source of tolerances.

Everything is held against float64 **on the rounded inputs**. Per element

    bound = c * (eps(dtype) * A + eps(float32) * B + smallest * (1 + F))

A is the same contraction on magnitudes (for out: |W| |V|): what rounding can cost. B is A with each term
weighted by the rounding error of its score, in units of eps, which the exponential turns into a relative
error of the probability. F is the sum of the magnitudes that a term below the smallest number of the dtype
can be lost against. c is 8, and 16 for gradients in 16 bits. Beside it stands a gate on the root mean square
error where the data is ordinary: the bound sees one wrong element, the gate a small error everywhere.

Two helpers for whole modules, where no magnitudes are at hand:

    assert_module_close(ours, exact, stock)   |ours - exact| <= c * max(eps * max|exact|, max|stock - exact|)
    assert_close(actual, expected)            two computations of one thing that may round differently
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

C = 8.0
C_GRADIENT_16_BIT = 16.0
GATES = {"out": (0.7, 9.2), "dv": (0.95, 12.0)}
"""Root mean square errors allowed in units of eps, in 16 bits and otherwise: twice what honest kernels reached."""
GATE_OF_SLOPES = (2.0, 12.0)
"""The same for dq, dk and d_bias, where differences of near numbers are taken."""
NOISE = 0.02
"""The part of the magnitudes that is added to the size of a result for its gate, because results cancel."""
CANCELLED = 0.001
"""No gate where less than this part of the magnitudes is left (one key: dq is 0, and what is computed is noise)."""


@dataclass
class Exact:
    """A float64 result with what its error may be made of (see the formula above); all of one shape."""

    value: Tensor
    rounding: Tensor
    exponent: Tensor
    floor: Tensor
    gradient: bool = False

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """value, rounding, exponent, floor."""
        return self.value, self.rounding, self.exponent, self.floor

    def map(self, change: Callable[[Tensor], Tensor]) -> Exact:
        """The same with each tensor changed alike: a slice, a mean over heads."""
        value, rounding, exponent, floor = map(change, self.tensors)
        return Exact(value, rounding, exponent, floor, self.gradient)

    def bound(self, dtype: torch.dtype, tf32: bool = False) -> Tensor:
        """The largest error allowed per element of a result in `dtype`."""
        eps, eps_scores, smallest = units(dtype, tf32)
        c = C_GRADIENT_16_BIT if self.gradient and dtype.itemsize == 2 else C
        floor = self.floor + (self.rounding > 0)  # terms and the result itself; 0 stays exact where nothing is added
        return c * (eps * self.rounding + eps_scores * self.exponent + smallest * floor)


@dataclass
class Verdict:
    """One result against its bound and its gate."""

    name: str
    ratio: float
    """The largest error in units of its bound; infinite where NaN or infinity do not match."""
    rmse: float
    """Root mean square error in units of the gate; 0 where there is no gate."""
    message: str

    @property
    def passed(self) -> bool:
        """Whether both are kept."""
        return self.ratio <= 1 and self.rmse <= 1


def units(dtype: torch.dtype, tf32: bool = False) -> tuple[float, float, float]:
    """(eps of results, eps of scores, smallest number) of a kernel on `dtype`, with TF32 products if said so."""
    if dtype == torch.float64:
        return torch.finfo(dtype).eps, torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    single = torch.finfo(torch.float32)
    eps_scores = 2.0**-10 if tf32 and dtype == torch.float32 else single.eps
    info = torch.finfo(dtype)
    return max(info.eps, eps_scores), eps_scores, max(single.tiny, info.tiny * info.eps)


def coarsest(*tensors: Tensor) -> torch.dtype:
    """The dtype with the largest epsilon: all that a computation on these tensors can reach."""
    return max((t.dtype for t in tensors), key=lambda dtype: torch.finfo(dtype).eps)


def compare(
    name: str,
    actual: Tensor,
    exact: Exact,
    gate: bool = False,
    tf32: bool = False,
    dtype: torch.dtype | None = None,
) -> Verdict:
    """Hold a result against its oracle. `gate` asks for the root mean square too: for ordinary data only.

    `dtype` is that of the computation where actual is wider: a float32 bias gradient from 16-bit queries.
    """
    if actual.shape != exact.value.shape:
        shapes = f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.value.shape)}"
        return Verdict(name, math.inf, 0.0, shapes)
    dtype = dtype or actual.dtype
    got = actual.detach().to(exact.value)
    bound = exact.bound(dtype, tf32)
    same = (got == exact.value) | (got.isnan() & exact.value.isnan())
    error = torch.where(same, 0.0, (got - exact.value).abs())
    ratios = torch.where(same, 0.0, error / bound).nan_to_num(nan=math.inf, posinf=math.inf)
    ratio = float(ratios.max()) if ratios.numel() else 0.0
    rmse = _gate(name, got, exact, dtype, tf32) if gate else 0.0
    return Verdict(name, ratio, rmse, _describe(name, actual, exact, bound, ratios, rmse))


def _gate(name: str, got: Tensor, exact: Exact, dtype: torch.dtype, tf32: bool) -> float:
    def rms(t: Tensor) -> float:
        return float(t.square().mean().sqrt()) if t.numel() else 0.0

    value, terms = rms(exact.value), rms(exact.rounding)
    if not CANCELLED * terms < value < math.inf:
        return 0.0
    size = value + NOISE * terms
    limit = GATES.get(name, GATE_OF_SLOPES)[dtype.itemsize != 2] * units(dtype, tf32)[0]
    return rms(got - exact.value) / size / limit


def _describe(name: str, actual: Tensor, exact: Exact, bound: Tensor, ratios: Tensor, rmse: float) -> str:
    if not ratios.numel():
        return f"{name}: empty"
    at = _position(ratios)
    place = ", ".join(map(str, at))
    return (
        f"{name} {str(actual.dtype).removeprefix('torch.')}: {int((ratios > 1).sum())} of {ratios.numel()} beyond "
        f"the bound; worst at [{place}]: {float(actual[at]):.9g}, exact {float(exact.value[at]):.9g}, bound "
        f"{float(bound[at]):.3g} ({float(ratios[at]):.3g} x); rmse {rmse:.3g} of its gate"
    )


def assert_verdicts(verdicts: list[Verdict], where: object = "") -> None:
    """Raise AssertionError with one line for each that failed; `where` (a case, say) heads the message."""
    failed = [v.message for v in verdicts if not v.passed]
    if failed:
        raise AssertionError("\n".join([str(where), *failed] if str(where) else failed))


def assert_module_close(ours: Tensor, exact: Tensor, stock: Tensor, name: str = "result") -> float:
    """Two modules on the same input and parameters, beside a float64 run of either; returns error / allowed.

    For every tensor that the modules return and for every gradient. `ours` and `stock` have the dtype under
    test, `exact` is float64. NaN and infinities must agree with `exact`.
    """
    got, reference, other = ours.detach().double(), exact.detach().double(), stock.detach().double()
    if got.shape != reference.shape:
        raise AssertionError(f"{name}: shape {tuple(got.shape)}, expected {tuple(reference.shape)}")
    return _assert_within(name, got, reference, ours.dtype, _largest(other - reference))


def assert_close(actual: Tensor, expected: Tensor, name: str = "result", dtype: torch.dtype | None = None) -> float:
    """Two computations of one thing in `dtype` (by default actual's) that may round differently, elementwise.

    |actual - expected| <= 2 c * eps(dtype) * max|expected|; returns error / allowed. For values that are not sums
    of large terms that cancel: those need `oracle` or `assert_module_close`.
    """
    got, want = actual.detach().double(), expected.detach().double()
    if got.shape != want.shape:
        raise AssertionError(f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    dtype = dtype or actual.dtype
    return _assert_within(name, got, want, dtype, 2 * torch.finfo(dtype).eps * _largest(want))


def _assert_within(name: str, got: Tensor, want: Tensor, dtype: torch.dtype, error: float) -> float:
    info = torch.finfo(dtype)
    c = C_GRADIENT_16_BIT if dtype.itemsize == 2 else C
    allowed = c * max(info.eps * _largest(want), error, info.tiny)
    same = (got == want) | (got.isnan() & want.isnan())
    off = torch.where(same, 0.0, (got - want).abs()).nan_to_num(nan=math.inf)
    worst = float(off.max()) if off.numel() else 0.0
    if worst > allowed:
        at = _position(off)
        raise AssertionError(
            f"{name}: {float(got[at]):.9g} at [{', '.join(map(str, at))}], expected {float(want[at]):.9g}; "
            f"off by {worst:.3g}, {allowed:.3g} allowed"
        )
    return worst / allowed


def _position(t: Tensor) -> tuple[int, ...]:
    """Where t is largest."""
    flat, at = int(t.argmax()), []
    for n in reversed(t.shape):
        flat, i = divmod(flat, n)
        at.append(i)
    return tuple(reversed(at))


def _largest(t: Tensor) -> float:
    finite = t[t.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
