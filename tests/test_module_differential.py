"""`attn.MultiheadAttention` against `nn.MultiheadAttention` on random configurations of everything.

Both run on the same parameters and inputs, and PyTorch's once more in float64; outputs, weights and every gradient
are compared, and where PyTorch raises, ours raises the same type. `ATTN_TEST_BACKEND=name` runs one forced backend;
configurations that it refuses are counted by its reason, not compared. `ATTN_TEST_SEEDS=begin:end` runs those seeds.

What ours may be off from float64 is a multiple of what PyTorch is off by, or where that is less of one unit in the last
place of the largest element: 8 times, as sums run in another order, and 16 times in 16 bits, where probabilities and
their gradients are rounded at other places (`attn.testing.assert_module_close`). The worst part of that is reported.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attn
from attn import native
from attn.testing import assert_module_close, spy

sys.path.insert(0, str(Path(__file__).parent))
from module_configs import Call, Config, call_of, double, draw, stock_module

CONFIGURATIONS = 1000
FORCED_CONFIGURATIONS = 300
"""For a backend that is forced: the same ones, from the start."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SEEDS = os.environ.get("ATTN_TEST_SEEDS", "")
REFUSED = "was asked for and cannot run this call"
FORCED = os.environ.get("ATTN_TEST_BACKEND")


def backends() -> list[str]:
    """ "" (the planner's choice) and each backend that CPU tensors can be forced onto."""
    if FORCED:
        return [FORCED]
    here = attn.available_backends()
    return ["", *(name for name in ("cpu", "sdpa", "reference") if name in here)]


def seeds(backend: str) -> range:
    """Those that this run takes."""
    begin, _, end = SEEDS.partition(":")
    return range(int(begin or 0), int(end or (FORCED_CONFIGURATIONS if backend else CONFIGURATIONS)))


Results = dict[str, Tensor | None]


def results_of(module: nn.MultiheadAttention, c: Config, call: Call) -> Results:
    """Output, weights and every gradient of one run."""
    module.zero_grad()
    with contextlib.nullcontext() if c.grad else torch.no_grad():
        out, weights = module(**call.tensors, **c.kwargs)
    found: Results = {"out": out, "weights": weights}
    if not c.grad or (c.dead_rows and c.need_weights):
        return found
    g = torch.Generator().manual_seed(c.seed + 2)
    loss = out.new_zeros(())
    for name, result in (("out", out), ("weights", weights)):
        if result is not None and (c.loss in (name, "both") or weights is None):
            loss = loss + (result * torch.randn(result.shape, generator=g).to(c.dtype).to(result.dtype)).sum()
    loss.backward()
    found |= {f"grad of {n}": p.grad for n, p in module.named_parameters()}
    return found | {f"grad of {n}": leaf.grad for n, leaf in call.leaves().items()}


@contextlib.contextmanager
def fast_path(enabled: bool) -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def outcome(module: nn.MultiheadAttention, c: Config, call: Call) -> Results | Exception:
    """What a run returns, or the exception that it raises."""
    try:
        return results_of(module, c, call if c.fault else call.copied(c.dtype))
    except Exception as error:
        return error


def raises_in_stock_only(c: Config) -> bool:
    """Calls that PyTorch refuses for no reason and ours runs (docs/differences.md)."""
    return 0 in c.sizes and bool(c.padding or c.attn_mask)


class Tally(Counter[str]):
    """Counts of what happened, and the messages of what should not have."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong: list[str] = []
        self.worst = 0.0
        """The largest error, as a part of what is allowed."""

    def report(self, name: str) -> str:
        served = ", ".join(f"{k.removeprefix('by ')} {n}" for k, n in sorted(self.items()) if k.startswith("by "))
        words = [
            f"{k} {self[k]}"
            for k in (
                "configurations",
                "compared",
                "errors alike",
                "only PyTorch raises",
                "refused",
                "unsupported",
                "mismatches",
            )
        ]
        why = [f"\n  {n} times: {k.removeprefix('because ')}" for k, n in self.items() if k.startswith("because ")]
        error = f"worst error {self.worst:.2f} of what is allowed"
        return f"differential [{name}]: {', '.join(words)}; served by {served}; {error}{''.join(why)}"


def as_stock_runs_it(c: Config) -> Config:
    """The configuration with which PyTorch's result is right (docs/differences.md): its fused CPU kernel has wrong
    gradients in rows that are finfo.min throughout, and takes the hint for the mask where keys are appended."""
    if c.fault:
        return c
    if c.attn_mask == "finfo.min" and not c.need_weights:
        return replace(c, need_weights=True, loss="out")
    return replace(c, is_causal=c.is_causal and not c.follows_mask)


def exact_and_stock(c: Config, stock: nn.MultiheadAttention, call: Call, theirs: Results) -> tuple[Results, Results]:
    """PyTorch's results in float64, and ones whose distance from them says what its rounding costs in c.dtype."""
    with fast_path(False):
        exact = results_of(double(stock), c, call.copied(torch.float64))
        # What cancels is of the size of the largest result; where all of it cancels, PyTorch may be exact by luck.
        finite = [t.detach()[t.isfinite()].abs() for t in exact.values() if t is not None]
        largest = max((float(t.max()) for t in finite if t.numel()), default=0.0)
        eps = torch.finfo(torch.float64).eps
        if c.dtype != torch.float64:
            noise = torch.finfo(c.dtype).eps * largest
            gone = {n for n, t in exact.items() if t is not None and bool((t.abs() <= eps * largest).all())}
            return exact, {n: t.double() + noise if t is not None and n in gone else t for n, t in theirs.items()}
        single = results_of(copy.deepcopy(stock).float(), c, call.copied(torch.float32))
    # Twice: PyTorch's float64 result, which stands for the truth, is rounded as ours is.
    finer, noise = 2 * eps / torch.finfo(torch.float32).eps, eps * largest
    return exact, {n: t if t is None else t + (single[n] - t) * finer + noise for n, t in exact.items()}


def compare(c: Config, backend: str, tally: Tally) -> None:
    """One configuration; raises AssertionError where ours differs."""
    stock = stock_module(c)
    ours = attn.MultiheadAttention(**c.ctor, dtype=c.dtype, masked_rows="nan" if c.dead_rows else "zero").train(
        c.training
    )
    ours.load_state_dict(stock.state_dict())
    call = call_of(c)
    theirs_of = as_stock_runs_it(c)
    with fast_path(not (c.fault or c.dead_rows or c.is_causal)):
        theirs = outcome(stock, theirs_of, call)
    with spy() as calls, attn.use_backend(backend) if backend else contextlib.nullcontext():
        got = outcome(ours, c, call)
    tally["configurations"] += 1
    for name in {name for name, _ in calls}:
        tally[f"by {name}"] += 1
    if isinstance(got, Exception) and REFUSED in str(got):
        tally["refused"] += 1
        tally["because " + str(got).split(REFUSED, 1)[-1].lstrip(": ").split(". The call", 1)[0]] += 1
    elif isinstance(theirs, Exception) and raises_in_stock_only(c):
        tally["only PyTorch raises"] += 1
        tally["unsupported"] += isinstance(got, Exception)
    elif isinstance(theirs, Exception):
        tally["errors alike"] += 1
        if type(got) is not type(theirs):
            raise AssertionError(f"PyTorch raises {theirs!r}, ours: {got!r:.200}")
    elif c.fault:
        raise AssertionError("the fault shows no effect in PyTorch")
    elif isinstance(got, Exception):
        tally["unsupported"] += 1
        raise AssertionError(f"ours raises {got!r}")
    else:
        tally["compared"] += 1
        exact, rounded = exact_and_stock(theirs_of, stock, call, theirs)
        if not c.need_weights:
            exact = exact | {"weights": None}
        for name, expected in exact.items():
            error = compare_one(name, got[name], expected, theirs[name], rounded[name])
            tally.worst = max(tally.worst, error)


def compare_one(
    name: str, mine: Tensor | None, exact: Tensor | None, theirs: Tensor | None, rounded: Tensor | None
) -> float:
    """One result: in dtype and shape PyTorch's, in value the exact one. Returns the error, as a part of the allowed."""
    if exact is None or theirs is None or rounded is None:
        # No gradient at all in PyTorch; ours may be one of zeros.
        if mine is not None and (name == "weights" or bool(mine.any())):
            raise AssertionError(f"{name} is not None as in PyTorch, but {mine}")
        return 0.0
    if mine is None or mine.dtype != theirs.dtype:
        raise AssertionError(f"{name} is {mine if mine is None else mine.dtype}, in PyTorch {theirs.dtype}")
    return assert_module_close(mine, exact, rounded, name)


def compare_all(configs: Iterable[Config], backend: str, name: str, capsys: pytest.CaptureFixture[str]) -> Tally:
    """All of them; prints the counts under `name` and fails where one differs."""
    tally = Tally()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the deprecation of mixed mask types has its own test
        for c in configs:
            try:
                compare(c, backend, tally)
            except AssertionError as error:
                tally["mismatches"] += 1
                tally.wrong.append(f"{error}\n    {c}")
    with capsys.disabled():
        print("\n" + tally.report(name))
    assert not tally.wrong, f"{len(tally.wrong)} mismatches\n" + "\n".join(tally.wrong[:8])
    assert tally["unsupported"] == 0
    return tally


@pytest.mark.parametrize("backend", backends(), ids=lambda name: name or "planner")
def test_random_configurations(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    tally = compare_all(map(draw, seeds(backend)), backend, backend or "planner", capsys)
    assert backend or SEEDS or tally["compared"] + tally["errors alike"] >= 500


def instruction_sets() -> list[object]:
    """Those that run here; only the chosen one at every run."""
    unusable = native.load() is not None or bool(FORCED)
    skip = pytest.mark.skipif(unusable, reason=f"{FORCED} is forced" if FORCED else str(native.load()))
    return [pytest.param(i, marks=[skip, *([] if i == native.isa else [pytest.mark.slow])]) for i in native.usable()]


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_dtype_on_the_kernels(dtype: torch.dtype, isa: str, capsys: pytest.CaptureFixture[str]) -> None:
    """None is refused, and each has a result or raises as PyTorch does."""
    configs = (replace(draw(seed), dtype=dtype) for seed in range(FORCED_CONFIGURATIONS))
    with native.use_isa(isa):
        tally = compare_all(configs, "cpu", f"cpu, {isa}, {str(dtype).removeprefix('torch.')}", capsys)
    assert tally["refused"] == 0
    assert tally["by cpu"] >= tally["compared"] >= 250
