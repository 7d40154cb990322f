"""The CPU kernels beside PyTorch's: `python -m attn.benchmarks.bench_cpu`, or `pytest benchmarks/bench_cpu.py`.

Every case is a pair that takes turns: ours and `F.scaled_dot_product_attention`, or `nn.MultiheadAttention`, the order
changing from round to round. The whole list is run several times; what binds is the median over the runs of the ratio
of medians. GFLOP/s of the visible scores and the share of a peak measured beside them are reported too: of float32
multiply-adds, or in bf16 of dot products where those are the better ones.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attn
from attn import masks, native
from attn.benchmarks.machine import machine
from attn.benchmarks.timer import CpuTimer

BF16, F32 = torch.bfloat16, torch.float32
Shape = tuple[int, int, int, int]  # B, H, S, D
LONG: tuple[Shape, ...] = ((1, 16, 2048, 64), (1, 8, 2048, 128), (1, 8, 8192, 64))
SMALL: Shape = (8, 8, 128, 64)
DOCUMENTS, WINDOW = 4, 256
DECODING = (8, 32, 8192, 128)  # B, H, S, D
MODULE = (2048, 1024, 16)  # length, features, heads
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One pair. `mask` is "full", "causal", "padding", "bias" or a key of DENSE, `what` is "forward", "backward" or
    "bias gradient"; `target` is the least ratio to PyTorch's time."""

    shape: Shape
    mask: str
    dtype: torch.dtype = F32
    what: str = "forward"
    target: float = 1.0

    def __str__(self) -> str:
        size = ",".join(map(str, self.shape))
        return f"{self.what} {str(self.dtype).removeprefix('torch.')} {self.mask} ({size})"


@dataclass(frozen=True)
class Row:
    """What a case came to in one run."""

    case: str
    backend: str
    torch: float
    """PyTorch's median in `unit`."""
    attn: float
    gflops: float
    """Over visible scores; 0 where not counted, as the share."""
    share: float
    target: float
    unit: str = "ms"

    @property
    def ratio(self) -> float:
        """PyTorch's figure over ours."""
        return self.torch / self.attn


Job = tuple[str, Callable[[float], Row]]
"""The name of a row, and its measurement in so many seconds."""


def cases() -> Iterator[Case]:
    """All pairs of attention itself, with the ratios to reach."""
    for dtype, full, causal in ((F32, 1.2, 1.4), (BF16, 2.0, 2.4)):
        for shape in LONG:
            yield Case(shape, "full", dtype, target=full)
            yield Case(shape, "causal", dtype, target=causal)
    for mask, target in (
        ("random", 1.3),
        ("causal as bool", 2.3),
        ("documents", 4.0),
        ("window", 4.0),
        ("bias", 1.15),
    ):
        yield Case((1, 16, 2048, 64), mask, target=target)
    yield Case((4, 16, 1024, 64), "padding", target=1.6)
    yield Case((1, 16, 2048, 64), "bias", what="bias gradient", target=1.2)
    for dtype, full, causal in ((F32, 1.35, 1.9), (BF16, 2.2, 2.8)):
        yield Case(SMALL, "full", dtype, target=full)
        yield Case(SMALL, "causal", dtype, target=causal)
    for dtype, full, causal in ((F32, 1.2, 1.45), (BF16, 1.6, 2.0)):
        yield Case((1, 16, 2048, 64), "full", dtype, "backward", full)
        yield Case((1, 16, 2048, 64), "causal", dtype, "backward", causal)
    yield Case(SMALL, "causal", BF16, "backward", 4.0)


def _random_mask(S: int) -> Tensor:
    return torch.rand(S, S) > 0.5


def _bool(visible: Callable[[Tensor, Tensor, int], Tensor]) -> Callable[[int], Tensor]:
    def made(S: int) -> Tensor:
        return visible(torch.arange(S)[:, None], torch.arange(S), S)

    return made


DENSE: dict[str, Callable[[int], Tensor]] = {  # what PyTorch is given, by length
    "random": _random_mask,
    "causal as bool": _bool(lambda i, j, S: j <= i),
    "documents": _bool(lambda i, j, S: i * DOCUMENTS // S == j * DOCUMENTS // S),
    "window": _bool(lambda i, j, S: (i - j).abs() <= WINDOW // 2),
}


def _masks(case: Case) -> tuple[dict[str, Any], dict[str, Any], float]:
    """(PyTorch's options, ours, the visible share of all scores)."""
    B, H, S, _ = case.shape
    if case.mask == "full":
        return {}, {}, 1.0
    if case.mask == "causal":
        return {"is_causal": True}, {"mask": masks.causal()}, (S + 1) / (2 * S)
    if case.mask == "bias":
        bias = torch.randn(H, S, S, requires_grad=case.what == "bias gradient")
        return {"attn_mask": bias[None]}, {"bias": bias}, 1.0
    if case.mask == "padding":
        lengths = torch.full((B,), S // 2)
        visible = (torch.arange(S) < lengths[:, None])[:, None, None]
        return {"attn_mask": visible}, {"mask": masks.padding(lengths)}, 0.5
    visible = DENSE[case.mask](S)
    ours = {
        "documents": lambda: masks.documents((torch.arange(S) * DOCUMENTS // S).expand(B, S)),
        "window": lambda: masks.window(WINDOW // 2, WINDOW // 2),
    }.get(case.mask, lambda: masks.dense(visible))
    return {"attn_mask": visible}, {"mask": ours()}, float(visible.float().mean())


def _pair(case: Case) -> tuple[Run, Run, float, str]:
    """(PyTorch's run, ours, FLOPs over visible scores, the backend that serves)."""
    B, H, S, D = case.shape
    grad = case.what != "forward"
    q, k, v = (torch.randn(B, S, H, D, dtype=case.dtype).transpose(1, 2).requires_grad_(grad) for _ in range(3))
    theirs, ours, visible = _masks(case)
    wanted = [q, k, v] + [t for t in ours.values() if isinstance(t, Tensor) and t.requires_grad]
    d_out = torch.randn_like(q)

    def run(call: Callable[[], Tensor]) -> Run:
        if not grad:
            return call
        out = call()
        return lambda: torch.autograd.grad(out, wanted, d_out, retain_graph=True)

    backend = attn.explain(q, k, v, **ours).chosen
    return (
        run(functools.partial(F.scaled_dot_product_attention, q, k, v, **theirs)),
        run(functools.partial(attn.attention, q, k, v, **ours)),
        4 * B * H * S * S * D * visible * (2.5 if grad else 1.0),
        backend or "",
    )


def race(theirs: Run, ours: Run, seconds: float) -> tuple[float, float]:
    """Medians in ms of two contenders that take turns, at least 5 rounds each."""
    times: tuple[list[float], list[float]] = ([], [])
    pair = (theirs, ours)
    for run in pair:
        run()
    end = time.perf_counter() + seconds
    while len(times[0]) < 5 or time.perf_counter() < end:
        for which in (0, 1) if len(times[0]) % 2 else (1, 0):
            start = time.perf_counter()
            pair[which]()
            times[which].append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def peak(dtype: torch.dtype) -> float:
    """GFLOP/s of float32 multiply-adds, or in bf16 of dot products where this CPU has them and they are quicker."""
    return max(native.peak_gflops(), native.peak_gflops(pairs=True) if dtype == BF16 else 0.0)


def measure(case: Case, seconds: float) -> Row:
    """One case, the peak measured just before it."""
    torch.manual_seed(0)
    return _raced(case, _pair(case), seconds)


def _raced(case: Case, pair: tuple[Run, Run, float, str], seconds: float) -> Row:
    theirs, ours, flops, backend = pair
    most = peak(case.dtype)
    torch_ms, attn_ms = race(theirs, ours, seconds)
    gflops = flops / attn_ms / 1e6
    return Row(str(case), backend, torch_ms, attn_ms, gflops, gflops / most, case.target)


def _decoding(name: str, dtype: torch.dtype, kv_heads: int, new: int, target: float, seconds: float) -> Row:
    """Against PyTorch's attention of the same new tokens; the share is that of a plain read of the cache."""
    B, H, S, D = DECODING
    torch.manual_seed(0)
    q = torch.randn(B, H, new, D, dtype=dtype)
    k, v = (torch.randn(B, kv_heads, S, D, dtype=dtype) for _ in range(2))
    lengths = torch.full((B,), S, dtype=torch.int32)
    visible = torch.arange(S) <= torch.arange(S - new, S)[:, None]
    theirs = functools.partial(
        F.scaled_dot_product_attention, q, k, v, None if new == 1 else visible, enable_gqa=kv_heads < H
    )
    ours = functools.partial(attn.decode_attention, q, k, v, lengths=lengths)
    torch_ms, attn_ms = race(theirs, ours, seconds)
    read_ms = race(k.view(torch.float32).sum, v.view(torch.float32).sum, seconds / 4)
    return Row(name, "cpu", torch_ms, attn_ms, 0.0, sum(read_ms) / attn_ms, target)


def _step(module: nn.Module, x: Tensor, weights: bool) -> None:
    """A call, and in training its backward pass."""
    with torch.set_grad_enabled(module.training):
        out = module(x, x, x, need_weights=weights)[0]
    if module.training:
        out.sum().backward()


def _modules(training: bool) -> tuple[nn.Module, nn.Module, Tensor]:
    """PyTorch's, ours with the same parameters, and an input."""
    length, features, heads = MODULE
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(features, heads, batch_first=True).train(training)
    ours = attn.MultiheadAttention(features, heads, batch_first=True).train(training)
    ours.load_state_dict(stock.state_dict())
    return stock, ours, torch.randn(1, length, features)


def _module(name: str, training: bool, weights: bool, target: float, seconds: float) -> Row:
    stock, ours, x = _modules(training)
    times = race(functools.partial(_step, stock, x, weights), functools.partial(_step, ours, x, weights), seconds)
    return Row(name, "cpu", *times, 0.0, 0.0, target)


def _memory_of(which: int) -> float:
    """MiB that a training step of one of the modules adds to a process that has run a short one; NaN if unknown."""
    module, x = (parts := _modules(training=True))[which], parts[2]
    _step(module, x[:, :64], weights=True)
    used = CpuTimer().memory(lambda: _step(module, x, weights=True))
    return float("nan") if used is None else used / 2**20


def _memory(name: str, target: float, _: float) -> Row:
    """In a process each: what an allocator keeps is counted to whom it belongs."""
    used = []
    for which in (0, 1):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            used.append(alone.submit(_memory_of, which).result())
    return Row(name, "cpu", *used, 0.0, 0.0, target, "MiB")


def jobs() -> Iterator[Job]:
    """Every row: attention itself, decoding, and `nn.MultiheadAttention` replaced."""
    for case in cases():
        yield str(case), functools.partial(measure, case)
    B, H, S, D = DECODING
    for dtype, kv_heads, new, target in (
        (F32, H, 1, 2.0),
        (BF16, H, 1, 6.0),
        (F32, 8, 1, 5.0),
        (BF16, 8, 1, 20.0),
        (F32, H, 8, 2.5),
    ):
        name = f"decode {str(dtype).removeprefix('torch.')} ({B},{H},{new}->{S},{D}), {kv_heads} key heads"
        yield name, functools.partial(_decoding, name, dtype, kv_heads, new, target)
    length, features, heads = MODULE
    size = f"(1,{length},{features}, {heads} heads)"
    for weights, training, target in ((True, False, 1.5), (True, True, 1.8), (False, True, 1.15)):
        name = f"module {'training step' if training else 'eval'}, need_weights={weights} {size}"
        yield name, functools.partial(_module, name, training, weights, target)
    name = f"module peak memory, training step {size}"
    yield name, functools.partial(_memory, name, 4.0)


def pytest_generate_tests(metafunc: Any) -> None:
    """`pytest benchmarks/bench_cpu.py`: a benchmark per case."""
    metafunc.parametrize("case", cases(), ids=str)


def test_pair(benchmark: Any, case: Case) -> None:
    """Times ours; the pair's figures go into the benchmark's JSON."""
    torch.manual_seed(0)
    pair = _pair(case)
    row = _raced(case, pair, seconds=1.0)
    benchmark.extra_info.update(asdict(row) | {"ratio": row.ratio})
    benchmark(pair[1])


def summary(runs: list[Row]) -> dict[str, Any]:
    """One case over its runs: medians, and the ratios that they came from."""
    figures = {name: statistics.median(getattr(r, name) for r in runs) for name in ("torch", "attn", "gflops", "share")}
    ratios = sorted(r.ratio for r in runs)
    met = statistics.median(ratios) >= 0.95 * runs[0].target
    return asdict(runs[0]) | figures | {"ratio": statistics.median(ratios), "ratios": ratios, "met": met}


def line(row: dict[str, Any]) -> str:
    """A summary for a reader."""
    figures = f"{row['torch']:9.3f} {row['attn']:9.3f} {row['unit']:3} {row['ratio']:5.2f}x (>= {row['target']:.2f})"
    share = f"{row['share']:4.0%}" if row["share"] else "    "
    spread = f"{row['ratios'][0]:.2f} to {row['ratios'][-1]:.2f}" if len(row["ratios"]) > 1 else ""
    verdict = "met" if row["met"] else "NOT MET"
    return f"{row['case']:62} {row['backend']:9} {figures} {share}  {verdict:7}  {spread}".rstrip()


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; 1 if a ratio misses its target by more than 5 %, 2 if no case has that name."""
    parser = argparse.ArgumentParser(prog="python -m attn.benchmarks.bench_cpu", description=(__doc__ or "").strip())
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures and the machine to PATH")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each pair in a run (3)")
    parser.add_argument("--runs", type=int, default=5, help="how often the whole list is run (5)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the rows whose name holds TEXT")
    args = parser.parse_args(argv)
    chosen = [job for job in jobs() if args.only in job[0]]
    if not chosen or args.runs < 1:
        print(f"no row is named like {args.only!r}" if not chosen else "--runs must be 1 or more", file=sys.stderr)
        return 2
    found: dict[str, list[Row]] = {name: [] for name, _ in chosen}
    for run in range(args.runs):
        for name, job in chosen:
            found[name].append(job(args.seconds))
            print(f"run {run + 1}: {line(summary(found[name][-1:]))}", flush=True)
    rows = [summary(runs) for runs in found.values()]
    if args.runs > 1:
        print(f"\nmedians of {args.runs} runs, and the spread of the ratios")
        for row in rows:
            print(line(row))
    if args.json:
        args.json.write_text(json.dumps({**machine(), "runs": args.runs, "rows": rows}, indent=2) + "\n")
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
