"""The recurrent nets that came before attention: time over growing lengths, what runs in parallel, what is remembered.

python -m attn.benchmarks.rnn --json rnn.json --plot rnn.png

One layer each of `nn.LSTM`, a bidirectional one, and `attn.MultiheadAttention`, causal and full, with as many features.
Times are the processor time of one thread, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attn.benchmarks import harness, modules, recall, roofline, timer
from attn.benchmarks.machine import machine
from attn.benchmarks.peers import Contender
from attn.benchmarks.report import significant
from attn.benchmarks.work import Work, cost_of_module
from attn.cli.progress import progress
from attn.cli.table import table
from attn.transformer.attention import Attention
from attn.transformer.cache import KVCache
from attn.transformer.config import LayerConfig

HEADS, HEAD_DIM = 4, 64
FEATURES = HEADS * HEAD_DIM
LENGTHS = (64, 256, 1024, 4096)
"""Of one sequence."""
CUT = (32, 128, 512, 4096)
"""Lengths into which as many tokens as the longest sequence has are cut."""
MASKS = {"attention, causal": "causal", "attention, full": "full"}
FLOPS_OF_TOKEN = {"LSTM": 16 * FEATURES**2, "bidirectional LSTM": 12 * FEATURES**2}
"""Forward: the four gates of a cell, each of two matrices; backward takes twice as many."""


class ProcessorTimer(timer.CpuTimer):
    """Times a call by what the processor spent on it."""

    def sample(self, run: timer.Run) -> float:
        """Milliseconds of one call, from a cold cache."""
        self.flushed.add_(1)
        start = time.process_time()
        run()
        return (time.process_time() - start) * 1e3

    def memory(self, run: timer.Run) -> int | None:
        """Not asked for here."""
        return None


def training(batch: int, length: int, clock: timer.Timer, seconds: float) -> list[dict[str, Any]]:
    """Forward and backward of every net on (batch, length, FEATURES); attention is held against float64 first."""
    problems: dict[str, modules.ModuleProblem] = {}
    runs: dict[str, Callable[[], timer.Run]] = {}
    for name, make in recall.NETS.items():
        mask = MASKS.get(name, "full")
        m = modules.problem(Work("module", "both", mask=mask, B=batch, H=HEADS, L=length, D=HEAD_DIM))
        if name in MASKS:
            problems[name] = m
            runs[name] = _step(lambda m=m: m.call(m.ours), m.leaves(m.ours), m.d_out)
        else:
            net = make(FEATURES, HEADS)
            runs[name] = _step(lambda m=m, net=net: net(m.x), [m.x, *net.parameters()], m.d_out)

    def check(c: Contender) -> float:
        if c.name not in problems:
            return math.nan  # PyTorch's own, taken at its word
        m = problems[c.name]
        return modules.ModuleExpected(m).worst(m.ours)

    found = [Contender(name, lambda: torch.empty(0), ours=name in MASKS) for name in runs]
    rows = harness.race(found, runs, check, clock, seconds)
    return [_plain(row, batch, length, _flops(row.contender, batch, length)) for row in rows]


def _step(call: Callable[[], Tensor], leaves: list[Tensor], d_out: Tensor) -> Callable[[], timer.Run]:
    return lambda: lambda: torch.autograd.grad(call(), leaves, d_out)


def _flops(name: str, batch: int, length: int) -> int:
    """Of a training step."""
    if name in FLOPS_OF_TOKEN:
        return 3 * FLOPS_OF_TOKEN[name] * batch * length
    return cost_of_module(Work("module", "both", mask=MASKS[name], B=batch, H=HEADS, L=length, D=HEAD_DIM)).flops


def _plain(row: harness.Row, batch: int, length: int, flops: int | None = None) -> dict[str, Any]:
    if row.problem:
        raise RuntimeError(f"{row.contender} at length {length}: {row.problem}")
    found: dict[str, Any] = {"net": row.contender, "batch": batch, "length": length, "p50_ms": row.median}
    found |= {"p20_ms": row.percentile(20), "p80_ms": row.percentile(80)}
    if flops is not None:
        found |= {"gflops": flops / row.median / 1e6}
    return {n: round(v, 4) if isinstance(v, float) else v for n, v in found.items()}


def one_more(length: int, clock: timer.Timer, seconds: float) -> list[dict[str, Any]]:
    """The output of one token more, `length` tokens being known: from a state, from a cache, or all anew."""
    x = torch.randn(1, length + 1, FEATURES)
    nets = {name: make(FEATURES, HEADS).eval() for name, make in recall.NETS.items()}
    runs = {name: _anew(nets[name], x) for name in nets}
    recurrent = nets["LSTM"]
    assert isinstance(recurrent, recall.Last)
    state = torch.zeros(1, 1, FEATURES), torch.zeros(1, 1, FEATURES)
    runs["LSTM"] = _anew(lambda last: recurrent.net(last, state)[0], x[:, -1:])
    runs["attention, causal"] = _anew(_with_cache(length), x[:, -1:])
    found = [Contender(name, lambda: torch.empty(0)) for name in runs]
    rows = harness.race(found, {n: (lambda r=r: r) for n, r in runs.items()}, lambda _: math.nan, clock, seconds)
    return [_plain(row, 1, length) for row in rows]


def _anew(net: Callable[[Tensor], Tensor], x: Tensor) -> timer.Run:
    def run() -> Tensor:
        with torch.no_grad():
            return net(x)

    return run


def _with_cache(length: int) -> Callable[[Tensor], Tensor]:
    """A step of causal attention; the cache does not move on, so that each call does the same."""
    config = LayerConfig(FEATURES, HEADS, dropout=0.0, causal=True)
    layer, cache = Attention(config).eval(), KVCache(config, 1, 1, length + 1)
    cache.k.normal_()
    cache.v.normal_()
    cache.advance(length)
    return lambda x: layer.step(x, cache.layer(0))


def times(seconds: float, lengths: tuple[int, ...] = LENGTHS, cut: tuple[int, ...] = CUT) -> dict[str, Any]:
    """All that is timed."""
    clock, tokens = ProcessorTimer(), max(cut)
    one = [(1, length) for length in lengths]
    same = [(tokens // length, length) for length in cut]
    steps = list(dict.fromkeys([*one, *same]))
    found: dict[str, Any] = {"machine": machine(), "features": FEATURES}
    found["matrix_product_gflops"] = round(roofline.measure(clock, "cpu", set()).gflops["float32"], 1)
    rows: dict[tuple[int, int], list[dict[str, Any]]] = {}
    more: list[dict[str, Any]] = []
    with progress("rnn", len(steps) + len(lengths)) as advance:
        for batch, length in steps:
            rows[batch, length] = training(batch, length, clock, seconds)
            advance(f"training, {batch} of length {length}")
        for length in lengths:
            more += one_more(length, clock, seconds)
            advance(f"one token after {length}")
    found |= {"one_sequence": [row for at in one for row in rows[at]]}
    return found | {"same_tokens": [row for at in same for row in rows[at]], "one_more": more}


def text(found: dict[str, Any]) -> str:
    """The figures as tables."""
    parts = []
    for part, title in (
        ("one_sequence", "ms of a training step, one sequence of length"),
        ("same_tokens", "GFLOP/s of a training step, as many tokens cut into length"),
        ("one_more", "ms for one token more, after"),
    ):
        value = "gflops" if part == "same_tokens" else "p50_ms"
        by_net: dict[str, list[str]] = {}
        for row in found.get(part, []):
            by_net.setdefault(row["net"], []).append(significant(row[value]))
        lengths = dict.fromkeys(str(row["length"]) for row in found.get(part, []))
        parts.append(table((title, *lengths), [(net, *cells) for net, cells in by_net.items()], indent=""))
    if "recall" in found:
        rows = [(r["net"], str(r["parameters"]), *(f"{share:.3f}" for share in r["right"])) for r in found["recall"]]
        headers = ("share recalled, by pairs shown", "parameters", *map(str, recall.PAIRS))
        parts.append(table(headers, rows, indent=""))
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Times and trains on one thread, prints the tables; 0."""
    parser = argparse.ArgumentParser(
        prog="python -m attn.benchmarks.rnn", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write all figures to PATH; parts that are there stay"
    )
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw them to a PNG")
    parser.add_argument("--part", choices=("times", "recall", "none"), help="only this; none: what --json PATH holds")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for the rounds of each length (1)")
    parser.add_argument("--steps", type=int, default=recall.STEPS, help=f"training steps of recall ({recall.STEPS})")
    parser.add_argument("--lengths", type=_numbers, default=LENGTHS, metavar="N,N", help="of one sequence")
    parser.add_argument("--cut", type=_numbers, default=CUT, metavar="N,N", help="of the same number of tokens")
    args = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    try:
        if args.json and args.json.exists():
            found = json.loads(args.json.read_text())
        if args.part in (None, "times"):
            found |= times(args.seconds, args.lengths, args.cut)
        if args.part in (None, "recall"):
            found["recall"] = [recall.learned(name, args.steps) for name in recall.NETS]
    finally:
        torch.set_num_threads(threads)
    print(text(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.plot:
        from attn.benchmarks import rnn_plot

        rnn_plot.draw(found, args.plot)
    return 0


def _numbers(words: str) -> tuple[int, ...]:
    return tuple(int(word) for word in words.split(","))


if __name__ == "__main__":
    raise SystemExit(main())
