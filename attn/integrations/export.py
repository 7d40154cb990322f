"""Exported programs for places where this package is not installed: ONNX, other runtimes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from attn import ops
from attn.backends import load
from attn.spec import DecodeOperands, Operands


def standard_ops(program: ExportedProgram) -> ExportedProgram:
    """The program with this package's ops taken apart into PyTorch's, by their definition in `attn/reference.py`.

    What `torch.export` makes of a model holds `attn::attention_forward`, which runs on our kernels wherever this
    package is imported. Without it, or for `torch.onnx.export(program)`, call this first. Not for training: gradients
    of an exported program are another matter.

    Args:
        program: what `torch.export.export` returned.

    Returns:
        A new program, all of whose ops are PyTorch's.

    Raises TypeError for what is no ExportedProgram.

    >>> import attn
    >>> m = attn.MultiheadAttention(8, 2, batch_first=True).eval()
    >>> x = torch.randn(1, 3, 8)
    >>> program = standard_ops(torch.export.export(m, (x, x, x)))
    >>> [n for n in program.graph.nodes if str(n.target).startswith("attn.")]
    []
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"program is {type(program).__name__}; give what torch.export.export returned")
    table: Any = torch.export.default_decompositions()
    table[ops.attention_forward] = _forward
    table[ops.attention_backward] = _backward
    table[ops.decode] = _decode
    plain: ExportedProgram = program.run_decompositions(table)
    return plain


def _forward(*args: Any) -> tuple[Tensor, ...]:
    *operands, weights, _ = args
    x = Operands(*operands)
    if weights:
        return load("reference").forward_weights(x, weights == "mean")
    return *load("reference").forward(x), x.q.new_empty(0)


def _backward(
    d_out: Tensor | None, d_lse: Tensor | None, d_weights: Tensor | None, out: Tensor, m: Tensor, l: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *operands, needs_bias_grad, _ = rest
    x = Operands(*operands)
    d_out = torch.zeros_like(out) if d_out is None else d_out
    *grads, d_bias = load("reference").backward(x, (out, m, l), d_out, d_lse, d_weights, needs_bias_grad)
    return *grads, x.q.new_empty(0) if d_bias is None else d_bias


def _decode(*args: Any) -> tuple[Tensor, ...]:
    return load("reference").decode(DecodeOperands(*args[:-1]))
