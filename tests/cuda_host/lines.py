"""Cases as short lines: a situation of attn.testing.matrix, a dtype, and changes: "causal bf16 L=65 S=64".

Two changes are none that a case can say: `bias_dtype=fp64`, and `wild_pages=True` for page numbers that no cache has.
"""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from attn.spec import DecodeOperands, Operands
from attn.testing import Case
from attn.testing.matrix import situation

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class LineCase(Case):
    """A case whose operands are changed once they are made."""

    bias_dtype: str = ""
    wild_pages: bool = False

    def operands(self) -> Operands | DecodeOperands:
        x = super().operands()
        if isinstance(x, DecodeOperands):
            return _with_wild_pages(x) if self.wild_pages else x
        if self.bias_dtype and x.bias is not None:
            x = x._replace(bias=x.bias.to(DTYPES[self.bias_dtype]))
        return x


def _with_wild_pages(x: DecodeOperands) -> DecodeOperands:
    """Each sequence's first page has a number below 0 or past the last: right results clamp it."""
    assert x.block_table is not None
    table = x.block_table.clone()
    pages = x.k_cache.shape[0]
    wild = torch.tensor([pages, -1, (1 << 31) - 1], dtype=table.dtype)
    table[:, 0] = wild.repeat(len(table))[: len(table)]
    return x._replace(block_table=table)


def made(text: str) -> Case:
    """The case of a line."""
    name, dtype, *changes = text.split()
    more: dict[str, Any] = {}
    for change in changes:
        key, _, value = change.partition("=")
        try:
            more[key] = ast.literal_eval(value)
        except ValueError:  # a word
            more[key] = value
    own = {key: more.pop(key) for key in ("bias_dtype", "wild_pages") if key in more}
    case = situation(name, DTYPES[dtype], **more)
    return LineCase(**{f.name: getattr(case, f.name) for f in dataclasses.fields(case)}, **own) if own else case
