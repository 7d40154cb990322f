"""Other libraries, where they are installed: flash-attn, flash-attn 4, xFormers. Not run on hardware yet."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attn.benchmarks.problem import Absent, Call, Problem, batched, packed
from attn.spec import Operands


def _only_on_gpu(p: Problem, name: str, distribution: str) -> ModuleType:
    """The module of a library with kernels for NVIDIA GPUs in 16 bits, for calls with no more than a band."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and name.startswith(error.name or "?")
        raise Absent("not installed" if missing else f"{distribution} does not load: {error}") from None
    if p.spec.device != "cuda":
        raise Absent("runs on CUDA only")
    if p.spec.dtype not in (torch.float16, torch.bfloat16):
        raise Absent("takes float16 and bfloat16 only")
    if any(getattr(p.spec, n) for n in ("bias", "keep", "documents", "query_lengths", "prefix", "softcap", "paged")):
        raise Absent("has no such mask")
    if p.spec.op == "decode" or p.spec.key_lengths:
        raise Absent("its call with a cache is not compared")
    return module


def _end_anchored(p: Problem) -> Operands:
    x = p.x
    assert isinstance(x, Operands)
    if p.spec.band == "start" and x.q.shape[2] != x.k.shape[2]:
        raise Absent("its masks are anchored at the end")
    return x


def flash_attn(p: Problem) -> Call:
    """flash-attn 2: (B, L, H, D)."""
    library = _only_on_gpu(p, "flash_attn", "flash-attn")
    x = _end_anchored(p)
    options: dict[str, Any] = {"softmax_scale": x.scale, "causal": p.spec.causal, "alibi_slopes": x.alibi_slopes}
    if p.spec.band and not p.spec.causal:
        options["window_size"] = (x.left, x.right)
    if x.cu_seqlens_q is not None:
        bounds = (x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k)
        return lambda: batched(library.flash_attn_varlen_func(*packed(x), *bounds, **options))
    return lambda: library.flash_attn_func(*_by_tokens(x), **options).transpose(1, 2)  # type: ignore[no-any-return]


def flash_attn_4(p: Problem) -> Call:
    """flash-attn 4, which is written in CuTe."""
    library = _only_on_gpu(p, "flash_attn.cute", "flash-attn-4")
    x = _end_anchored(p)
    if x.cu_seqlens_q is not None or p.spec.alibi or (p.spec.band and not p.spec.causal):
        raise Absent("only full and causal calls are compared")

    def run() -> Tensor:
        found = library.flash_attn_func(*_by_tokens(x), softmax_scale=x.scale, causal=p.spec.causal)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out.transpose(1, 2)

    return run


def xformers(p: Problem) -> Call:
    """xFormers' memory_efficient_attention."""
    library = _only_on_gpu(p, "xformers.ops", "xformers")
    x = _end_anchored(p)
    if p.spec.grouped or x.cu_seqlens_q is not None or p.spec.alibi or (p.spec.band and not p.spec.causal):
        raise Absent("only full and causal calls with equal heads are compared")
    bias = library.LowerTriangularMask() if p.spec.causal else None
    run = library.memory_efficient_attention
    return lambda: run(*_by_tokens(x), attn_bias=bias, scale=x.scale).transpose(1, 2)  # type: ignore[no-any-return]


def _by_tokens(x: Operands) -> list[Tensor]:
    return [t.transpose(1, 2) for t in (x.q, x.k, x.v)]
