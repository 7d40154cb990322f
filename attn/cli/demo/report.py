"""What the demo prints."""

from __future__ import annotations

import torch

from attn.cli.demo.models import Size
from attn.cli.demo.text import Corpus
from attn.cli.demo.train import FIRST, RUN, Pair
from attn.cli.table import table

ROWS = 6


def introduction(corpus: Corpus, size: Size) -> str:
    """What is going to happen."""
    gpu = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"Text: Python's own manual (pydoc_data.topics), {len(corpus.text):,} characters, "
        f"{len(corpus.letters)} different.\n"
        f"Models: {size.layers} layers, {size.width} features, {size.heads} heads; batches of {size.batch} x "
        f"{size.length} characters; {size.steps} steps, float32, {where}.\n"
        "Each is trained twice from one seed: with nn.MultiheadAttention, and after attn.replace(model)."
    )


def section(pair: Pair, size: Size) -> str:
    """The tables of one model."""
    steps = len(pair.stock.losses)
    stopped = (
        "" if steps == size.steps else f"; stopped after {steps} of {size.steps} steps: {size.seconds:g} s were over"
    )
    shown = sorted({round(i * (steps - 1) / (ROWS - 1)) for i in range(ROWS)})
    losses = [
        (str(i + 1), f"{pair.stock.losses[i]:.6f}", f"{pair.ours.losses[i]:.6f}", f"{pair.differences[i]:.1e}")
        for i in shown
    ]
    ratio = f"{pair.ours.ms / pair.stock.ms:.2f}"
    costs = [
        ("ms per step (median)", f"{pair.stock.ms:.1f}", f"{pair.ours.ms:.1f}", ratio),
        ("peak memory of a step, MiB", *_memory(pair)),
    ]
    largest = max(pair.differences)
    at = pair.differences.index(largest) + 1
    return "\n".join(
        [
            f"{pair.task.name} ({pair.task.call}){stopped}",
            table(("loss at step", "torch", "attn", "rel. difference"), losses, left=0),
            f"  largest difference {largest:.1e} at step {at} (may be {RUN:.0e}); "
            f"at the first step {pair.differences[0]:.1e} (may be {FIRST:.0e})",
            "",
            table(("cost", "torch", "attn", "attn / torch"), costs),
            f"  backends that ran attn's step: {_backends(pair)}",
        ]
    )


def _memory(pair: Pair) -> tuple[str, str, str]:
    a, b = pair.stock.peak_bytes, pair.ours.peak_bytes
    if not a or not b:
        return "not known", "not known", ""
    return f"{a / 2**20:.1f}", f"{b / 2**20:.1f}", f"{b / a:.2f}"


def _backends(pair: Pair) -> str:
    ran = [f"{backend} ({what} x {n})" for (backend, what), n in sorted(pair.ran.items())]
    return ", ".join(ran) or "none"


def verdict(agree: bool) -> str:
    """The last word on the losses."""
    return "The losses agree." if agree else "THE LOSSES DO NOT AGREE: please report this with the tables above."
