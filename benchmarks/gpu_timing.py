"""The timings of the GPU suite: all contenders take turns in one run, so that clocks and heat are the same for all."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import attn

SECONDS = 460.0
"""Time for the whole suite."""
TOKENS = 16384  # batch times length
ROUNDS, CALLS = 5, 3
SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}

Run = Callable[[], object]


@dataclass
class Timing:
    """The median of one contender in one place. `tflops` counts the useful work: half of it where causal."""

    contender: str
    what: str  # "forward", "backward", "backward deterministic" or "decode"
    head_dim: int
    length: int
    causal: bool
    ms: float
    spread: float  # (slowest - quickest) / median
    tflops: float
    error: str = ""


def timings(backend: str, device: str, small: bool, deadline: float) -> list[Timing]:
    """Forward, backward and decoding over head_dim, length and mask, most telling first, until the time is over."""
    rows: list[Timing] = []
    lengths = (64,) if small else (4096, 1024, 16384, 2048, 8192, 512)
    for length in lengths:
        for head_dim in (16,) if small else (128, 64, 256):
            for causal in (True, False):
                if time.monotonic() > deadline:
                    return rows
                rows += _training(backend, device, head_dim, length, causal, small)
    for length in (64,) if small else (8192, 65536):
        if time.monotonic() < deadline:
            rows += _decoding(backend, device, length, small)
    return rows


def _training(backend: str, device: str, head_dim: int, length: int, causal: bool, small: bool) -> list[Timing]:
    B, H = (1, 1) if small else (max(1, TOKENS // length), 2048 // head_dim)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = (
        torch.randn(B, length, H, head_dim, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    d_out = torch.randn(B, length, H, head_dim, device=device, dtype=dtype).transpose(1, 2)
    work = 4 * B * H * length * length * head_dim / (2 if causal else 1)
    contenders = _contenders(backend, device, causal, q, k, v, length)
    forward = {name: _without_gradient(run) for name, run in contenders.items()}
    place = (head_dim, length, causal)
    rows = _race(forward, "forward", place, work, device, small)
    alive = {r.contender for r in rows if not r.error}
    backward = {n: _backward_of(run, d_out, (q, k, v)) for n, run in contenders.items() if n in alive}
    if backend == "triton" and backend in alive and head_dim == 64:
        backward["triton, one pass"] = _in_one_pass(_backward_of(contenders[backend], d_out, (q, k, v)))
    rows += _race(backward, "backward", place, 2.5 * work, device, small)
    if not small:
        with _deterministic():
            both = {n: _backward_of(contenders[n], d_out, (q, k, v)) for n in (backend, "sdpa-flash") if n in alive}
            rows += _race(both, "backward deterministic", place, 2.5 * work, device, small)
    return rows


def _contenders(
    backend: str, device: str, causal: bool, q: Tensor, k: Tensor, v: Tensor, length: int
) -> dict[str, Callable[[], Tensor]]:
    def sdpa(which: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(which):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return run

    def ours() -> Tensor:
        return attn.scaled_dot_product_attention(q, k, v, is_causal=causal, backend=backend)

    found: dict[str, Callable[[], Tensor]] = {backend: ours}
    found |= (
        {name: sdpa(which) for name, which in SDPA.items()} if device == "cuda" else {"sdpa": sdpa(SDPBackend.MATH)}
    )
    if device == "cuda" and length in (1024, 4096, 16384):  # each shape costs a compile
        found["flex"] = _flex(causal, q, k, v)
    return found


def _flex(causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    run = torch.compile(flex_attention)
    mask: Any = None
    if causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], device="cuda")
    return lambda: run(q, k, v, block_mask=mask)  # type: ignore[no-any-return]


def _without_gradient(run: Run) -> Run:
    def inner() -> object:
        with torch.no_grad():
            return run()

    return inner


def _backward_of(run: Callable[[], Tensor], d_out: Tensor, leaves: tuple[Tensor, ...]) -> Run:
    out: list[Tensor] = []

    def inner() -> object:
        if not out:  # the first, untimed call
            out.append(run())
        return torch.autograd.grad(out[0], leaves, d_out, retain_graph=True)

    return inner


def _in_one_pass(run: Run) -> Run:
    """The single-pass backward, which is opt-in until such timings choose."""
    from attn.triton_kernels import config

    def inner() -> object:
        before, config.ONE_PASS = config.ONE_PASS, True
        try:
            return run()
        finally:
            config.ONE_PASS = before

    return inner


@contextlib.contextmanager
def _deterministic() -> Any:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _decoding(backend: str, device: str, length: int, small: bool) -> list[Timing]:
    B, H, Hk, D = (1, 2, 1, 16) if small else (16, 32, 8, 128)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q = torch.randn(B, H, 1, D, device=device, dtype=dtype)
    k, v = (torch.randn(B, Hk, length, D, device=device, dtype=dtype) for _ in range(2))
    lengths = torch.full((B,), length, dtype=torch.int32, device=device)
    contenders: dict[str, Run] = {
        backend: lambda: attn.decode_attention(q, k, v, lengths=lengths, backend=backend),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    }
    return _race(contenders, "decode", (D, length, True), 4 * B * H * length * D, device, small)


def _race(
    contenders: dict[str, Run], what: str, place: tuple[int, int, bool], work: float, device: str, small: bool
) -> list[Timing]:
    """The contenders in turn, round by round; one that fails is out, with its error."""
    taken: dict[str, list[float]] = defaultdict(list)
    errors: dict[str, str] = {}
    for turn in range(2 if small else ROUNDS + 1):  # the first one warms up
        for name, run in contenders.items():
            if name in errors:
                continue
            try:
                ms = _milliseconds(run, device, 1 if small or turn == 0 else CALLS)
            except Exception as error:  # a kernel that refuses a shape is a result too
                errors[name] = f"{type(error).__name__}: {str(error)[:200]}"
                continue
            if turn:
                taken[name].append(ms)
    rows = []
    for name in contenders:
        if name in errors:
            rows.append(Timing(name, what, *place, math.nan, math.nan, math.nan, errors[name]))
            continue
        middle = statistics.median(taken[name])
        spread = (max(taken[name]) - min(taken[name])) / middle
        rows.append(Timing(name, what, *place, round(middle, 5), round(spread, 3), round(work / middle / 1e9, 1)))
    return rows


def _milliseconds(run: Run, device: str, calls: int) -> float:
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def summary(rows: list[Timing], backend: str) -> str:
    """Geometric means of speed over each rival, with the best and the worst place."""
    by_place: dict[tuple[Any, ...], dict[str, Timing]] = defaultdict(dict)
    for r in rows:
        if not r.error:
            by_place[r.what, r.head_dim, r.length, r.causal][r.contender] = r
    ratios: dict[tuple[str, str], list[tuple[float, tuple[Any, ...]]]] = defaultdict(list)
    for place, found in by_place.items():
        for rival in found.keys() - {backend}:
            if backend in found:
                ratios[place[0], rival].append((found[rival].ms / found[backend].ms, place[1:]))
    lines = [f"{'pass':24}{'against':16}{'mean':>6}{'worst':>7}{'best':>7}  (times {backend} is quicker)"]
    for (what, rival), found_ratios in sorted(ratios.items()):
        mean = math.exp(statistics.mean(math.log(r) for r, _ in found_ratios))
        (low, where), (high, _) = min(found_ratios), max(found_ratios)
        at = f"D={where[0]} S={where[1]} {'causal' if where[2] else 'full'}"
        lines.append(f"{what:24}{rival:16}{mean:6.2f}{low:7.2f}{high:7.2f}  worst at {at}")
    return "\n".join(lines)
