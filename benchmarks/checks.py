"""Right before quick: what a contender returns is held against float64 by `attn.testing` before it is timed.

A large call is checked on a sample of its query rows, spread over the whole length: the gradient from above is zero in
all other rows, so that the sample determines dq, dk and dv in full, and what float64 has to compute stays small. Packed
and decoding calls are checked on the last of their heads. Everything else must be finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn import masks
from attn.spec import DecodeOperands, Operands
from attn.testing import Case, Exact, assert_verdicts, compare, oracle

SCORES = {"cpu": 1 << 20, "cuda": 1 << 26}
"""How many scores float64 computes for one case."""


@dataclass
class Expected:
    """What a call has to return: exact results of a part, `rows` and `heads` of it, and the gradient from above."""

    case: Case
    exact: dict[str, Exact]
    d_out: Tensor | None
    rows: Tensor | None
    heads: slice
    kv_heads: slice

    def worst(self, out: Tensor, gradients: tuple[Tensor, ...]) -> float:
        """The largest error over what is allowed. Raises AssertionError with the places where more is wrong."""
        found = dict(zip(("dq", "dk", "dv", "d_bias"), gradients, strict=False))
        for name, t in {"out": out, **found}.items():
            if not bool(t.isfinite().all()):
                raise AssertionError(f"{name} has {int((~t.isfinite()).sum())} of {t.numel()} elements not finite")
        parts = {"out": self._part(out)} | {n: self._part(t, n) for n, t in found.items()}
        tf32 = self.case.spec.device == "cuda" and torch.backends.cuda.matmul.allow_tf32
        dtype = {"d_bias": out.dtype}
        verdicts = [compare(n, t, self.exact[n], self.case.gated, tf32, dtype.get(n)) for n, t in parts.items()]
        assert_verdicts(verdicts, self.case)
        return max(max(v.ratio, v.rmse) for v in verdicts)

    def _part(self, t: Tensor, name: str = "out") -> Tensor:
        by_heads = t[:, self.kv_heads if name in ("dk", "dv") else self.heads]
        if self.rows is None or name in ("dk", "dv") or t.shape[2] == 1:
            return by_heads
        return by_heads[:, :, self.rows]


def expected(case: Case, x: Operands | DecodeOperands) -> Expected:
    """The exact results of that call on that data, or of as much of it as is affordable."""
    budget = SCORES[case.spec.device]
    if isinstance(x, Operands) and x.cu_seqlens_q is None:
        return _by_rows(case, x, budget)
    kv = x.k_cache.shape[1] if isinstance(x, DecodeOperands) else x.k.shape[1]
    group = x.q.shape[1] // kv
    kept = min(kv, max(1, budget // (group * case.B * case.L * case.S)))
    heads, kv_heads = slice((kv - kept) * group, None), slice(kv - kept, None)
    if x.alibi_slopes is not None:
        x = x._replace(alibi_slopes=x.alibi_slopes[:, heads])
    if isinstance(x, DecodeOperands):
        some = x._replace(q=x.q[:, heads], k_cache=x.k_cache[:, kv_heads], v_cache=x.v_cache[:, kv_heads])
        return Expected(case, oracle(some), None, None, heads, kv_heads)
    d_out = case.gradients(x)[0] if case.has_gradients else None
    part = x._replace(q=x.q[:, heads], k=x.k[:, kv_heads], v=x.v[:, kv_heads])
    exact = oracle(part, (None if d_out is None else d_out[:, heads], None, None))
    return Expected(case, exact, d_out, None, heads, kv_heads)


def _by_rows(case: Case, x: Operands, budget: int) -> Expected:
    B, H, L, _ = x.q.shape
    S = x.k.shape[2]
    count = min(L, max(2, budget // max(1, B * H * S)))
    rows = torch.linspace(0, L - 1, count, device=x.q.device).round().long().unique()
    d_out = None
    if case.has_gradients:
        full = case.gradients(x)[0]
        d_out = torch.zeros_like(full)
        d_out[:, :, rows] = full[:, :, rows]
    exact = oracle(_sampled(x, rows), (None if d_out is None else d_out[:, :, rows], None, None))
    return Expected(case, exact, d_out, rows, slice(None), slice(None))


def _sampled(x: Operands, rows: Tensor) -> Operands:
    """The call of these queries alone: masks that speak of positions become dense ones."""
    L, S = x.q.shape[2], x.k.shape[2]
    seen = masks.visibility(x, L, S)
    bias = x.bias
    if bias is not None and bias.shape[2] > 1:
        bias = bias[:, :, rows]
    if x.alibi_slopes is not None:
        slope = -masks.distances(x, L, S)[:, :, rows] * x.alibi_slopes.double()[:, :, None, None]
        bias = slope if bias is None else bias + slope
    if seen is not None and seen.shape[2] > 1:
        seen = seen[:, :, rows]
    q = x.q[:, :, rows]
    return Operands(q, x.k, x.v, bias=bias, keep=seen, scale=x.scale, softcap=x.softcap)
