"""The works of the presets, sized for the device, and sweeps over them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from attn.benchmarks.work import Work

TOKENS, FEATURES = 16384, 2048
"""Of the published sweep: batch times length, and heads times head_dim."""
SWEPT = {"seqlen": "L", "head_dim": "D", "heads": "H", "batch": "B", "dtype": "dtype", "mask": "mask", "pass": "what"}
"""Option of the command -> field of a work."""


def quick(device: str) -> Iterator[Work]:
    """One of each kind: under 90 seconds on two cores."""
    gpu = device == "cuda"
    base = Work(device=device, dtype=_dtype(device), B=4 if gpu else 1, H=16 if gpu else 8, L=4096 if gpu else 1024)
    yield base
    yield dataclasses.replace(base, mask="causal")
    yield dataclasses.replace(base, mask="causal", dtype="float16" if gpu else "bfloat16")
    for mask in ("window", "padding", "documents", "bias"):
        yield dataclasses.replace(base, mask=mask, B=max(2, base.B) if mask == "padding" else base.B)
    yield dataclasses.replace(base, mask="causal", what="backward")
    yield dataclasses.replace(base, mask="causal", what="both", L=base.L // 2)
    yield dataclasses.replace(base, kind="varlen", mask="causal", what="both", B=4, L=base.L // 4)
    yield dataclasses.replace(base, kind="decode", B=4, H=8, Hkv=2, L=1, S=4 * base.L)
    yield from _modules(dataclasses.replace(base, kind="module", B=2 * base.B, L=base.L // 2))
    yield dataclasses.replace(base, kind="layer", what="both", B=2 * base.B, L=base.L // 4)


def paper(device: str) -> Iterator[Work]:
    """head_dim 64, 128, 256 and lengths of 512 to 16k at 16k tokens, 2048 features: the sweep of published figures."""
    for what in ("forward", "backward"):
        for head_dim in (64, 128, 256):
            for length in (512, 1024, 2048, 4096, 8192, 16384):
                for mask in ("causal", "full"):
                    sizes = {"B": TOKENS // length, "H": FEATURES // head_dim, "L": length, "D": head_dim}
                    yield Work(what=what, device=device, dtype=_dtype(device), mask=mask, **sizes)


def bert(device: str) -> Iterator[Work]:
    """BERT base: 12 heads of 64, padded batches; with and without weights; two layers, on a GPU all twelve."""
    batch, layers = (64, 12) if device == "cuda" else (8, 2)
    for length in (128, 512):
        base = Work(device=device, dtype=_dtype(device), mask="padding", B=batch, H=12, L=length, D=64)
        yield base
        yield dataclasses.replace(base, what="both")
        yield from _modules(dataclasses.replace(base, kind="module"))
        for what in ("forward", "both"):
            yield dataclasses.replace(base, kind="layer", what=what, layers=layers)


def gpt(device: str) -> Iterator[Work]:
    """GPT-2 small: 12 heads of 64, causal, 1024 tokens; training, and decoding."""
    batch, layers = (16, 12) if device == "cuda" else (1, 2)
    base = Work(device=device, dtype=_dtype(device), mask="causal", B=batch, H=12, L=1024, D=64)
    for what in ("forward", "backward", "both"):
        yield dataclasses.replace(base, what=what)
    for what in ("forward", "both"):
        yield dataclasses.replace(base, kind="module", what=what)
        yield dataclasses.replace(base, kind="layer", what=what, layers=layers)
    yield dataclasses.replace(base, kind="decode", mask="full", B=8, L=1, S=1024)


def vit(device: str) -> Iterator[Work]:
    """ViT base: 197 tokens, which is no multiple of anything, 12 heads of 64."""
    batch, layers = (256, 12) if device == "cuda" else (16, 2)
    base = Work(device=device, dtype=_dtype(device), B=batch, H=12, L=197, D=64)
    for what in ("forward", "both"):
        yield dataclasses.replace(base, what=what)
        yield dataclasses.replace(base, kind="module", what=what)
        yield dataclasses.replace(base, kind="layer", what=what, layers=layers)


def decode(device: str) -> Iterator[Work]:
    """One new token, and four, against caches of 1k to 64k keys (on a CPU 16k), 32 heads of 128 sharing 8."""
    longest = 65536 if device == "cuda" else 16384
    base = Work("decode", device=device, dtype="bfloat16", H=32, Hkv=8, L=1, D=128)
    for batch in (1, 8):
        for length in (1024, 4096, 16384, 65536):
            if length <= longest and (device == "cuda" or batch * length <= 32768):
                yield dataclasses.replace(base, B=batch, S=length)
    yield dataclasses.replace(base, B=8, L=4, S=4096)
    yield dataclasses.replace(base, B=8, Hkv=32, S=4096)


PRESETS = {"quick": quick, "paper": paper, "bert": bert, "gpt": gpt, "vit": vit, "decode": decode}


def swept(works: Sequence[Work], values: dict[str, Sequence[Any]]) -> tuple[list[Work], list[str]]:
    """Each work once for each value of each field, and why some of these do not exist. Raises ValueError if none do."""
    found: list[Work] = []
    refused: list[str] = []
    for combination in itertools.product(*values.values()):
        for work in works:
            try:
                found.append(dataclasses.replace(work, **_fields(work, values, combination)))
            except ValueError as error:
                refused.append(str(error))
    if not found:
        raise ValueError(refused[0])
    return list(dict.fromkeys(found)), refused


def _fields(work: Work, names: Iterable[str], values: Iterable[Any]) -> dict[str, Any]:
    """The length of a decoding step is that of its cache."""
    renamed = {"L": "S"} if work.kind == "decode" else {}
    return {renamed.get(name, name): value for name, value in zip(names, values, strict=True)}


def _modules(base: Work) -> Iterator[Work]:
    """Evaluation and training, without and with the attention weights, which nn.MultiheadAttention returns unasked."""
    for what in ("forward", "both"):
        for weights in ("", "mean"):
            yield dataclasses.replace(base, what=what, weights=weights)


def _dtype(device: str) -> str:
    return "bfloat16" if device == "cuda" else "float32"
