"""Conservation laws: what holds for every right backward and forward, checked at a linear cost without a reference.

| law | catches |
| --- | --- |
| sum_j dv_j = sum over alive rows of d_out_i, per key head (no dropout) | dropped keys, dead-row leaks, races in dv |
| rows of d_bias sum to 0 (to d_lse where the lse has a gradient) | a wrong delta, stale residuals |
| sum q dq = sum k dk, per sequence and key head | errors of scale and stride in dq or dk |
| v = 1 gives out = 1 in alive rows, 0 in dead ones (no dropout) | normalisation, tails |
| q = 0 and causal gives the running mean of v | the anchor of masks, offsets beyond 2^31 |
| rows of the weights sum to 1 or 0 (no dropout) | the weights pass |

Each function returns a `Verdict`: give them to `assert_verdicts`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn import reference
from attn.backends import load
from attn.spec import Operands
from attn.testing.tolerance import Exact, Verdict, coarsest, compare


def check(backend: str, x: Operands, d_out: Tensor, *, bias_grad: bool = False) -> list[Verdict]:
    """All laws that apply to this padded call on a backend's passes."""
    engine = load(backend)
    out, m, l = engine.forward(x)
    dq, dk, dv, d_bias = engine.backward(x, (out, m, l), d_out, None, None, bias_grad)
    verdicts = [products(x, dq, dk, d_out)]
    if x.rng is None:
        ones = x._replace(v=torch.ones_like(x.v))
        verdicts += [values_gradient(x, dv, d_out, l), unit_values(ones, engine.forward(ones)[0], l)]
        verdicts.append(weight_sums(x, engine.weights(x, m, l, False), l))
    if bias_grad and d_bias is not None and x.bias is not None and x.bias.shape[3] == x.k.shape[2]:
        verdicts.append(bias_rows(x, d_bias, d_out))
    return verdicts


def values_gradient(x: Operands, dv: Tensor, d_out: Tensor, l: Tensor) -> Verdict:
    """sum_j dv_j = sum over alive rows of d_out_i, summed over each group of query heads."""
    g = d_out.double().masked_fill((l == 0)[..., None], 0.0)
    want = reference.per_key_head(x, g).sum(2)
    size = reference.per_key_head(x, g.abs()).sum(2)
    return _law("sum of dv", dv.dtype, dv.double().sum(2), want, size, size * _score_error(x))


def bias_rows(x: Operands, d_bias: Tensor, d_out: Tensor, d_lse: Tensor | None = None) -> Verdict:
    """Rows of d_bias sum to 0, or to d_lse; for a bias that is not broadcast over keys."""
    got = d_bias.double().sum(-1)
    want = torch.zeros_like(got)
    if d_lse is not None:
        want = d_lse.double()[..., None].sum_to_size(*d_bias.shape[:3], 1)[..., 0]
    size = _slope_size(x, d_out)[..., None].sum_to_size(*d_bias.shape[:3], 1)[..., 0]
    dtype = coarsest(d_bias, x.q)  # out was rounded to q's dtype before delta
    return _law("rows of d_bias", dtype, got, want, size, size * _score_error(x))


def products(x: Operands, dq: Tensor, dk: Tensor, d_out: Tensor) -> Verdict:
    """sum q dq = sum k dk per sequence and key head: both are sum dS (scale q k)."""
    q, k, _ = (t.double() for t in reference.within_lengths(x))
    got = reference.per_key_head(x, (q * dq.double()).sum((2, 3))[:, :, None, None])[..., 0, 0]
    want = (k * dk.double()).sum((2, 3))
    longest = _norm(k).amax((1, 2))[:, None, None] if k.numel() else k.new_zeros(k.shape[0], 1, 1)
    rows = _slope_size(x, d_out) * abs(x.scale) * _norm(q) * longest
    size = reference.per_key_head(x, rows.square().sum(2)[:, :, None, None])[..., 0, 0].sqrt()
    return _law("sum q dq - sum k dk", dq.dtype, got, want, size, size)


def unit_values(x: Operands, out: Tensor, l: Tensor) -> Verdict:
    """For a call with v = 1: out = 1 in alive rows, 0 in dead ones."""
    want = (l != 0).double()[..., None].expand(out.shape)
    return _law("out for v = 1", out.dtype, out.double(), want, want, want * _score_error(x))


def running_mean(x: Operands, out: Tensor) -> Verdict:
    """For a causal, start-anchored call with q = 0: out_i is the mean of v_0 ... v_i."""
    v = reference.per_query_head(x, x.v.double())[:, :, : out.shape[2]]
    count = torch.arange(1, v.shape[2] + 1, device=v.device, dtype=v.dtype).view(1, 1, -1, 1)
    size = v.abs().cumsum(2) / count
    return _law("running mean", out.dtype, out.double(), v.cumsum(2) / count, size, size)


def weight_sums(x: Operands, weights: Tensor, l: Tensor) -> Verdict:
    """Rows of the per-head weights sum to 1, dead ones to 0."""
    want = (l != 0).double()
    return _law("sum of weights", weights.dtype, weights.double().sum(-1), want, want, want * _score_error(x))


def _law(name: str, dtype: torch.dtype, got: Tensor, want: Tensor, rounding: Tensor, exponent: Tensor) -> Verdict:
    """got against want, with the epsilon of what it was computed from."""
    exact = Exact(want.to(got), rounding, exponent, rounding, gradient=True)
    return compare(name, got, exact, dtype=dtype)


def _slope_size(x: Operands, d_out: Tensor) -> Tensor:
    """A bound of sum_j |dS_ij| for each row: P (|dP| + |delta|) <= 2 |d_out_i| max_j |v_j|."""
    g = _norm(d_out.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
    v = _norm(reference.within_lengths(x)[2].double())
    largest = v.amax((1, 2))[:, None, None] if v.numel() else v.new_zeros(v.shape[0], 1, 1)
    kept = 1.0 if x.rng is None else 1 / max(1 - x.dropout_p, 1e-6)
    return 2 * g * largest * kept


def _norm(t: Tensor) -> Tensor:
    return t.square().sum(-1).sqrt()


def _score_error(x: Operands) -> float:
    """1 + the largest rounding error of a score in units of eps: |scale| |q| |k| and what is added to it."""
    q, k, _ = reference.within_lengths(x)
    if not q.numel() or not k.numel():
        return 1.0
    size = abs(x.scale) * float(_norm(q.double()).max()) * float(_norm(k.double()).max()) + x.softcap
    if x.bias is not None and x.bias.numel():
        size += float(x.bias.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().max())
    if x.alibi_slopes is not None and x.alibi_slopes.numel():
        size += float(x.alibi_slopes.abs().max()) * (q.shape[2] + k.shape[2])
    return 1 + 2 * size
