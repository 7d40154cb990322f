"""What a call costs: visible pairs of queries and keys, floating-point operations, and torch's FlopCounterMode.

A visible pair costs 2 (D + Dv) operations forward and 2 (3 D + 2 Dv) backward, a multiply-add counted as two. Pairs
that a mask hides count nothing (torch's own formulas for its attention count them).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attn import masks, reference
from attn.spec import UNBOUNDED, DecodeOperands, Operands

COUNTER = "torch.utils.flop_counter"


def forward_per_pair(head_dim: int, value_dim: int) -> int:
    """Operations of one visible pair: its score, and its share of the output."""
    return 2 * (head_dim + value_dim)


def backward_per_pair(head_dim: int, value_dim: int) -> int:
    """Operations of one visible pair: the score again, and its shares of dv, d_weights, dq and dk."""
    return 2 * (3 * head_dim + 2 * value_dim)


def visible_pairs(x: Operands | DecodeOperands) -> int:
    """Pairs (head, query, key) that no mask hides. Where values are not known (fake tensors), all that may be."""
    if any(_valueless(t) for t in x if isinstance(t, Tensor)):
        return _all_pairs(x)
    if isinstance(x, DecodeOperands):
        L, S = x.q.shape[2], _capacity(x)
        rows = Operands(x.q, x.q, x.q, key_lengths=x.lengths, left=x.left, right=0, end=True)
        return _in_bands(rows, L, S)
    if x.cu_seqlens_q is not None:
        return sum(visible_pairs(part) for _, _, _, part in reference.sequences(x))
    B, H, L, _ = x.q.shape
    S = x.k.shape[2]
    if x.ids_q is None and x.keep is None and x.prefix is None:
        return _in_bands(x, L, S)
    seen = masks.visibility(x, L, S)
    if seen is None:  # a prefix of keys without a band hides nothing
        return B * H * L * S
    return int(seen.sum()) * (B * H * L * S // max(1, seen.numel()))


def _in_bands(x: Operands, L: int, S: int) -> int:
    """Row by row, without a grid: what band and lengths leave visible."""
    B, H = x.q.shape[:2]
    lq, lk = (torch.as_tensor(n, device=x.q.device).reshape(-1, 1) for n in masks.lengths_of(x, L, S))
    i = torch.arange(L, device=x.q.device)
    off = lk - lq if x.end else torch.zeros_like(lk)
    first = torch.zeros_like(i) if x.left == UNBOUNDED else (i + off - x.left).clamp(min=0)
    last = lk - 1 if x.right == UNBOUNDED else torch.minimum(i + off + x.right, lk - 1)
    seen = ((last - first + 1).clamp(min=0) * (i < lq)).expand(B, L)
    return int(seen.sum()) * H


def _all_pairs(x: Operands | DecodeOperands) -> int:
    B, H, L, _ = x.q.shape
    return int(B * H * L * (_capacity(x) if isinstance(x, DecodeOperands) else x.k.shape[2]))


def _capacity(x: DecodeOperands) -> int:
    pages = 1 if x.block_table is None else x.block_table.shape[1]
    return pages * x.k_cache.shape[2]


def _valueless(t: Tensor) -> bool:
    from torch._subclasses.fake_tensor import is_fake

    return t.is_meta or bool(is_fake(t))


def _forward(*args: Any, out_val: Any = None) -> int:
    x = Operands(*args[: len(Operands._fields)])
    return visible_pairs(x) * forward_per_pair(x.q.shape[-1], x.v.shape[-1])


def _backward(*args: Any, out_val: Any = None) -> int:
    x = Operands(*args[6 : 6 + len(Operands._fields)])  # after the gradients from above and the residuals
    return visible_pairs(x) * backward_per_pair(x.q.shape[-1], x.v.shape[-1])


def _decode(*args: Any, out_val: Any = None) -> int:
    x = DecodeOperands(*args[: len(DecodeOperands._fields)])
    return visible_pairs(x) * forward_per_pair(x.q.shape[-1], x.v_cache.shape[-1])


def tell_counter() -> None:
    """Let FlopCounterMode see our ops: now where its module is loaded, else once it is."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:  # loading it here would load Triton, for a counter that most programs never ask for
        sys.meta_path.insert(0, _WhenLoaded())


def _register(counter: ModuleType) -> None:
    for op, formula in (
        (torch.ops.attn.attention_forward, _forward),
        (torch.ops.attn.attention_backward, _backward),
        (torch.ops.attn.decode, _decode),
    ):
        if op not in counter.flop_registry:
            counter.register_flop_formula(op, get_raw=True)(formula)


class _WhenLoaded(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the counter's module as anybody would, and registers our formulas in it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(fullname)
        if found is None or found.loader is None:
            return found
        self.real, found.loader = found.loader, self
        return found

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.real.exec_module(module)
        _register(module)
