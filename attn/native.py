"""The compiled library of the CPU kernels: loaded, its instruction set chosen, and its ops. `attn/native_cuda.py` has
that of the CUDA kernels.

The schemas stand here alone and exist on every install; a library only brings what runs behind them. The ops know
no autograd and check every shape, dtype and index themselves: a bad one is a ValueError.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

SETS = ("amx", "avx512bf16", "avx512", "avx2", "neon", "portable")
"""Instruction sets by the names that ATTN_CPU_ISA takes."""

_OPERANDS = (  # the fields of `attn.spec.Operands`, in their order
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? keep, Tensor? alibi_slopes, Tensor? key_lengths, "
    "Tensor? query_lengths, Tensor? ids_q, Tensor? ids_k, Tensor? prefix, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? rng, int left, int right, bool end, int max_seqlen_q, int max_seqlen_k, float scale, float softcap, "
    "float dropout_p"
)
_PLAIN = "Tensor q, Tensor k, Tensor v, int left, int right, bool end, float scale, float softcap"
_FOUR = "(Tensor, Tensor, Tensor, Tensor)"
NO_WEIGHTS, MEAN, HEADS = range(3)
WEIGHTS = {"": NO_WEIGHTS, "mean": MEAN, "heads": HEADS}
"""What the ops take as `weights`, by the words of `AttentionSpec.weights`: none, averaged over the heads, per head."""

PASSES = (  # of every library
    # out, m, l, weights; None for what is not asked for.
    f"forward({_OPERANDS}, int weights, bool residuals) -> {_FOUR}",
    f"weights(Tensor m, Tensor l, {_OPERANDS}, bool average) -> Tensor",
    "backward(Tensor d_out, Tensor? d_lse, Tensor? d_weights, Tensor out, Tensor m, Tensor l, "
    f"{_OPERANDS}, bool bias_grad) -> {_FOUR}",
    "decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? block_table, Tensor? alibi_slopes, "
    "int left, int right, float scale, float softcap) -> (Tensor, Tensor)",
)
_SHORT = (
    # The same for calls of three tensors: every argument and result more costs time that small calls do not have.
    f"infer({_PLAIN}) -> Tensor",
    f"infer_weights({_PLAIN}, int weights) -> (Tensor, Tensor)",
    f"plain({_PLAIN}, int weights) -> {_FOUR}",
    f"plain_backward(Tensor d_out, Tensor out, Tensor m, Tensor l, {_PLAIN}) -> {_FOUR}",
)


def define(namespace: str, schemas: tuple[str, ...], keys: tuple[str, ...]) -> torch.library.Library:
    """The ops of one library, without what runs behind them; they exist as long as the returned object."""
    library = torch.library.Library(namespace, "DEF")  # type: ignore[no-untyped-call]
    for schema in schemas:
        library.define(schema)  # type: ignore[no-untyped-call]
        # They have no derivative, and torch's fallback for such ops is slow. Nor may a kernel stand at autograd's key:
        # keys behind it resolve lazy negation and lazy zeros, and serve tensor subclasses.
        for key in keys:
            name = schema.partition("(")[0]
            library.impl(name, torch.library.fallthrough_kernel, key)  # type: ignore[no-untyped-call]
    return library


def op(namespace: str, name: str) -> Any:
    """The op as cheaply as it can be called: without the Python method around it, where this torch has one."""
    found = getattr(getattr(torch.ops, namespace), name).default
    return getattr(found, "_op", found)


_library = define("attn_cpu", (*PASSES, *_SHORT), ("AutogradCPU",))
forward, weights, backward, decode = (op("attn_cpu", name) for name in ("forward", "weights", "backward", "decode"))
infer, infer_weights = op("attn_cpu", "infer"), op("attn_cpu", "infer_weights")
plain, plain_backward = op("attn_cpu", "plain"), op("attn_cpu", "plain_backward")


def path(kind: str = "cpu") -> Path:
    """Where the library for "cpu" or "cuda" is, if it was built."""
    return Path(__file__).with_name(f"_native_{kind}" + (".dll" if sys.platform == "win32" else ".so"))


def build_info() -> dict[str, Any]:
    """What the build wrote down about itself; empty in a source tree where nothing was built."""
    try:
        info: dict[str, Any] = importlib.import_module("attn._build_info").INFO
    except ImportError:
        return {}
    return info


isa = ""
"""The instruction set in use; "" where the library is not loaded. Written here alone."""


def _select(name: str | None) -> bool:
    global isa
    found = _open().attn_cpu_select(None if name is None else name.encode())
    if found is None:
        return False
    isa = bytes(found).decode()
    return True


@functools.cache
def load() -> str | None:
    """Load the library once and select the instruction set; one sentence with the cure where that is not possible."""
    if not path().is_file():
        why = build_info().get("why_no_cpu") or "this source tree has not been built"
        return f"its library is not here: {why}; with a C++ compiler, pip install -e . in the source tree builds it"
    try:
        _open()
    except (OSError, AttributeError) as error:  # the latter: a library of another version
        return f"its library does not load ({error}); pip install --force-reinstall attn-kernels builds it anew"
    wish = os.environ.get("ATTN_CPU_ISA") or None
    if not _select(wish):
        return f"ATTN_CPU_ISA is {wish!r}, and this CPU or build runs only {', '.join(usable())}; unset it"
    return None


@functools.cache
def _open() -> ctypes.CDLL:
    library = ctypes.CDLL(str(path()))  # its ops are registered as it is loaded
    library.attn_cpu_select.argtypes, library.attn_cpu_select.restype = [ctypes.c_char_p], ctypes.c_char_p
    library.attn_cpu_poison.argtypes, library.attn_cpu_poison.restype = [ctypes.c_int], None
    library.attn_cpu_multiply_adds.argtypes = [ctypes.c_int64, ctypes.c_bool]
    library.attn_cpu_multiply_adds.restype = ctypes.c_double
    return library


def usable() -> tuple[str, ...]:
    """The instruction sets that this build has and this CPU runs."""
    try:
        _open()
    except (OSError, AttributeError):
        return ()
    before = isa
    found = tuple(name for name in SETS if _select(name))
    _select(before or None)
    return found


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Another instruction set inside the block, in the whole process. Raises ValueError where it cannot run here."""
    before = isa
    if load() is not None or not _select(name):
        raise ValueError(f"instruction set {name!r} cannot run here; usable: {', '.join(usable()) or 'none'}")
    try:
        yield
    finally:
        _select(before)


def poison(on: bool) -> None:
    """Whether new outputs start as NaN, so that a test sees what a kernel does not write."""
    if load() is None:
        _open().attn_cpu_poison(int(on))


def peak_gflops(threads: int | None = None, pairs: bool = False) -> float:
    """GFLOP/s of float32 multiply-adds in registers on so many threads (torch's number), the best of a few tries.

    `pairs`: of bfloat16 dot products instead; 0 where the instruction set has none.
    """
    if load() is not None:
        return 0.0
    run, threads, rounds, best = _open().attn_cpu_multiply_adds, threads or torch.get_num_threads(), 1_000_000, 0.0
    with ThreadPoolExecutor(threads) as pool:  # ctypes releases the interpreter's lock
        for _ in range(5):
            start = time.perf_counter()
            done = sum(pool.map(run, [rounds] * threads, [pairs] * threads))
            best = max(best, done / (time.perf_counter() - start) / 1e9)
    return best
