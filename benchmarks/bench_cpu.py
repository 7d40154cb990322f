"""The CPU kernels beside PyTorch's: `python -m attn.benchmarks.bench_cpu`, or `pytest benchmarks/bench_cpu.py`.

Every case is a pair that takes turns in one run: ours and `F.scaled_dot_product_attention`, or
`nn.MultiheadAttention`, the order changing from round to round. What binds is the ratio of the medians; GFLOP/s of the
visible scores and the share of a peak measured in the same run stand beside it.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attn
from attn import masks, native

BF16, F32 = torch.bfloat16, torch.float32
Shape = tuple[int, int, int, int]  # B, H, S, D
LONG: tuple[Shape, ...] = ((1, 16, 2048, 64), (1, 8, 2048, 128), (1, 8, 8192, 64))
SMALL: Shape = (8, 8, 128, 64)
DOCUMENTS, WINDOW = 4, 256
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One pair. `mask` is a key of MASKS, `what` a pass; `target` is the least ratio to PyTorch's time."""

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
    """What a case came to: medians in ms, GFLOP/s over visible scores, share of the peak (0 where not counted)."""

    case: str
    backend: str
    torch_ms: float
    attn_ms: float
    gflops: float
    share: float
    target: float

    @property
    def ratio(self) -> float:
        """PyTorch's time over ours."""
        return self.torch_ms / self.attn_ms


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


def measure(case: Case, peak: float, seconds: float) -> Row:
    """One case; `peak` in GFLOP/s of float32 multiply-adds."""
    torch.manual_seed(0)
    theirs, ours, flops, backend = _pair(case)
    torch_ms, attn_ms = race(theirs, ours, seconds)
    gflops = flops / attn_ms / 1e6
    return Row(str(case), backend, torch_ms, attn_ms, gflops, gflops / peak, case.target)


def decoding(seconds: float) -> Iterator[Row]:
    """Decoding against PyTorch's attention of the same new tokens; the share is that of a plain read of the cache."""
    B, H, S, D = 8, 32, 8192, 128
    for dtype, kv_heads, new, target in (
        (F32, H, 1, 2.0),
        (BF16, H, 1, 6.0),
        (F32, 8, 1, 5.0),
        (BF16, 8, 1, 20.0),
        (F32, H, 8, 2.5),
    ):
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
        read_ms = race(k.view(torch.int32).sum, v.view(torch.int32).sum, seconds / 4)
        name = f"decode {str(dtype).removeprefix('torch.')} ({B},{H},{new}->{S},{D}), {kv_heads} key heads"
        yield Row(name, "cpu", torch_ms, attn_ms, 0.0, sum(read_ms) / attn_ms, target)


def modules(seconds: float) -> Iterator[Row]:
    """`nn.MultiheadAttention` replaced: the default call in eval and a training step, with weights and without."""
    L, E, H = 2048, 1024, 16
    for need_weights, training, target in ((True, False, 1.5), (True, True, 1.8), (False, True, 1.15)):
        torch.manual_seed(0)
        stock = nn.MultiheadAttention(E, H, batch_first=True).train(training)
        ours = attn.MultiheadAttention(E, H, batch_first=True).train(training)
        ours.load_state_dict(stock.state_dict())
        x = torch.randn(1, L, E)

        def run(module: nn.Module, x: Tensor = x, training: bool = training, weights: bool = need_weights) -> None:
            with torch.set_grad_enabled(training):
                out = module(x, x, x, need_weights=weights)[0]
            if training:
                out.sum().backward()

        torch_ms, attn_ms = race(functools.partial(run, stock), functools.partial(run, ours), seconds)
        name = f"module {'training step' if training else 'eval'}, need_weights={need_weights} (1,{L},{E}, {H} heads)"
        yield Row(name, "cpu", torch_ms, attn_ms, 0.0, 0.0, target)


def rows(seconds: float, only: str = "") -> Iterator[Row]:
    """Every row whose name holds `only`; the peak is measured anew before each."""
    for case in cases():
        if only in str(case):
            yield measure(case, native.peak_gflops(), seconds)
    if only in "decode":
        yield from decoding(seconds)
    if only in "module":
        yield from modules(seconds)


def pytest_generate_tests(metafunc: Any) -> None:
    """`pytest benchmarks/bench_cpu.py`: a benchmark per case."""
    metafunc.parametrize("case", cases(), ids=str)


def test_pair(benchmark: Any, case: Case) -> None:
    """Times ours; the pair's figures go into the benchmark's JSON."""
    row = measure(case, native.peak_gflops(), seconds=1.0)
    benchmark.extra_info.update(asdict(row) | {"ratio": row.ratio})
    benchmark(_pair(case)[1])


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; 1 if a ratio misses its target by more than 5 %."""
    parser = argparse.ArgumentParser(prog="python -m attn.benchmarks.bench_cpu", description=(__doc__ or "").strip())
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures and the machine to PATH")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each pair (3)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the cases whose name holds TEXT")
    args = parser.parse_args(argv)
    found = []
    for row in rows(args.seconds, args.only):
        found.append(row)
        verdict = "met" if row.ratio >= 0.95 * row.target else "NOT MET"
        share = f"{row.share:4.0%}" if row.share else "    "
        print(
            f"{row.case:62} {row.backend:9} {row.torch_ms:9.3f} {row.attn_ms:9.3f} ms  {row.ratio:5.2f}x "
            f"(>= {row.target:.2f}) {share}  {verdict}",
            flush=True,
        )
    if args.json:
        machine = {
            "attn": attn.__version__,
            "torch": torch.__version__,
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "isa": native.isa,
        }
        table = [asdict(row) | {"ratio": row.ratio} for row in found]
        args.json.write_text(json.dumps({**machine, "rows": table}, indent=2) + "\n")
    return 0 if all(row.ratio >= 0.95 * row.target for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
