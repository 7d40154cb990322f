"""Makes Triton's interpreter right for bfloat16 and strict about masked loads.

Triton keeps bfloat16 as bit patterns there and does arithmetic and dot products on the integers; here every such
operation is done in float32 and rounded to nearest even. Lanes of a load that are masked off without a value get NaN,
or a wild integer, instead of a friendly 0: on a GPU they are undefined.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _wide(bits: Any) -> Any:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def _narrow(x: Any) -> Any:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, np.uint16(0x7FFF), rounded)


def _is_bfloat16(x: Any) -> bool:
    return bool(x.dtype.scalar == tl.bfloat16)


def _widened(x: Any) -> Any:
    return TensorHandle(_wide(x.data), tl.float32) if _is_bfloat16(x) else x


_original = {
    name: getattr(InterpreterBuilder, name)
    for name in ("binary_op", "unary_op", "cast_impl", "create_fp_to_fp", "create_dot", "create_masked_load")
}


def _binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
    if not (_is_bfloat16(lhs) or _is_bfloat16(rhs)):
        return _original["binary_op"](self, lhs, rhs, op)
    result = op(_widened(lhs).data, _widened(rhs).data)
    if result.dtype == np.bool_:
        return TensorHandle(result, tl.int1)
    return TensorHandle(_narrow(result), tl.bfloat16)


def _unary_op(self: Any, arg: Any, op: Any) -> Any:
    if not _is_bfloat16(arg):
        return _original["unary_op"](self, arg, op)
    return TensorHandle(_narrow(op(_widened(arg).data)), tl.bfloat16)


def _cast_impl(self: Any, src: Any, to: Any) -> Any:
    src = _widened(src)
    if to.scalar == tl.bfloat16:
        return TensorHandle(_narrow(src.data.astype(np.float32)), tl.bfloat16)
    return _original["cast_impl"](self, src, to)


def _fp_to_fp(self: Any, src: Any, to: Any, rounding: Any) -> Any:
    if _is_bfloat16(src) or to.scalar == tl.bfloat16:
        return _cast_impl(self, src, to)
    return _original["create_fp_to_fp"](self, src, to, rounding)


def _dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    return _original["create_dot"](self, _widened(a), _widened(b), d, *rest)


def _masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
    if other is None:
        element = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(element)
        wild = {"f": np.nan, "b": 1}.get(dtype.kind) or np.iinfo(dtype).max // 3
        fill = np.full_like(pointers.data, 0x7FC0 if element == tl.bfloat16 else wild, dtype=dtype)
        other = TensorHandle(fill, element)
    return _original["create_masked_load"](self, pointers, mask, other, *rest, **named)


_patched: set[int] = set()


class _Scope:
    """What the interpreter undoes when a kernel has ended."""

    def __init__(self, scope: Any) -> None:
        self.scope = scope

    def restore(self) -> None:
        self.scope.restore()
        _patched.clear()


def _patch_once(fn: Any) -> Any:
    """Triton patches its language at every call of a function; once per kernel and module is the same, and faster."""
    module = id(fn.__globals__)
    if module in _patched:
        return None
    _patched.add(module)
    return _Scope(_patch_lang(fn))


_patch_lang = interpreter._patch_lang


def install() -> None:
    """Replace those operations of the interpreter, for the whole process."""
    InterpreterBuilder.binary_op = _binary_op
    InterpreterBuilder.unary_op = _unary_op
    InterpreterBuilder.cast_impl = _cast_impl
    InterpreterBuilder.create_fp_to_fp = _fp_to_fp
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.create_masked_load = _masked_load
    interpreter._patch_lang = _patch_once
