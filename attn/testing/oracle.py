"""The float64 oracle: results of the reference, with the magnitudes that their bounds are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from attn import masks, reference
from attn.spec import DecodeOperands, Operands
from attn.testing.tolerance import Exact, Verdict, assert_verdicts, coarsest, compare

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""(d_out, d_lse, d_weights): what comes from above into backward."""
NO_GRADIENTS: Gradients = (None, None, None)


def oracle(x: Operands | DecodeOperands, gradients: Gradients = NO_GRADIENTS, weights: str = "") -> dict[str, Exact]:
    """Exact results by name: out and lse, weights where asked for, and with gradients dq, dk, dv and d_bias.

    Computed in float64 from the rounded inputs. `weights` is "", "mean" or "heads".
    """
    if isinstance(x, DecodeOperands):
        x = reference.as_attention(x)
    x = in_double(x)
    d_out, d_lse, d_weights = (None if g is None else g.double() for g in gradients)
    if d_out is None and (d_lse is not None or d_weights is not None):
        d_out = x.q.new_zeros(*x.q.shape[:3], x.v.shape[3])
    gradients = (d_out, d_lse, d_weights)
    if x.cu_seqlens_q is not None:
        return _packed(x, gradients)
    return _dense(x, gradients, weights, 0)


def in_double(x: Operands) -> Operands:
    """The same call with q, k, v and the bias as detached float64."""
    q, k, v = (t.detach().double() for t in (x.q, x.k, x.v))
    return x._replace(q=q, k=k, v=v, bias=None if x.bias is None else x.bias.detach().double())


def assert_forward(
    exact: dict[str, Exact],
    out: Tensor,
    lse: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    gate: bool = False,
    tf32: bool = False,
    where: object = "",
) -> list[Verdict]:
    """Hold forward results against `oracle(...)`; `gate` for ordinary data. Raises AssertionError; else verdicts."""
    found = {"out": out, "lse": lse, "weights": weights}
    verdicts = [compare(n, t, exact[n], gate and n == "out", tf32) for n, t in found.items() if t is not None]
    assert_verdicts(verdicts, where)
    return verdicts


def assert_gradients(
    exact: dict[str, Exact],
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    d_bias: Tensor | None = None,
    *,
    gate: bool = False,
    tf32: bool = False,
    where: object = "",
) -> list[Verdict]:
    """Hold gradients against `oracle(...)`; `gate` for ordinary data. Raises AssertionError; else verdicts."""
    found = {"dq": dq, "dk": dk, "dv": dv, "d_bias": d_bias}
    given = [t for t in (dq, dk, dv) if t is not None]
    coarse = coarsest(*given) if given else None
    verdicts = [
        compare(n, t, exact[n], gate, tf32, coarse if n == "d_bias" else None)
        for n, t in found.items()
        if t is not None
    ]
    assert_verdicts(verdicts, where)
    return verdicts


def _dense(x: Operands, gradients: Gradients, weights: str, sequence: int) -> dict[str, Exact]:
    s, d_cap, seen = reference.scores(x)
    kept, m, l, _ = reference.probabilities(x, sequence)
    p = reference.normalised(s, m, l)
    v = reference.per_query_head(x, reference.within_lengths(x)[2])
    error = _score_errors(x, s, d_cap)
    spread = 1 + error + (p * error).sum(-1, keepdim=True)  # of a probability, relative, in units of eps
    alive = _alive(s, l)
    lse = reference.lse_of(m, l)
    found = {
        "out": Exact(
            reference.times_values(x, kept, l),
            kept @ v.abs(),
            (kept * spread) @ v.abs(),
            alive @ v.abs(),
        ),
        "lse": Exact(
            lse,
            torch.zeros_like(lse),
            torch.where(l == 0, 0.0, 1 + (p * error).sum(-1) + lse.abs()),
            torch.zeros_like(lse),
        ),
    }
    none = torch.zeros_like(m)
    found["m"] = Exact(m, none, m.nan_to_num(neginf=0.0).abs() + 1 + _row_max(error), none)
    found["l"] = Exact(l, none, l * (1 + (p * error).sum(-1)), none)
    if weights:
        if seen is not None:
            kept = kept.masked_fill(~seen, 0.0)
        of_scores = torch.where(kept == 0, 0.0, kept * spread)  # hidden ones of a row with NaN are 0, not NaN
        shown = Exact(kept, kept, of_scores, alive.expand_as(kept))
        found["weights"] = shown.map(lambda t: t.mean(1)) if weights == "mean" else shown
    d_out, d_lse, d_weights = gradients
    if d_out is not None:
        found |= _gradients(x, (d_out, d_lse, d_weights), (p, spread, alive, l, d_cap), sequence)
    return found


def _gradients(
    x: Operands,
    gradients: tuple[Tensor, Tensor | None, Tensor | None],
    rows_of: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    sequence: int,
) -> dict[str, Exact]:
    d_out, d_lse, d_weights = gradients
    p, spread, alive, l, d_cap = rows_of
    q, k, v = (t.abs() for t in reference.within_lengths(x))
    keys, values = reference.per_query_head(x, k), reference.per_query_head(x, v)
    g = d_out.masked_fill((l == 0)[..., None], 0.0).abs()
    dw = g @ values.transpose(-1, -2)
    if d_weights is not None:
        share = d_weights if d_weights.dim() == 4 else d_weights[:, None] / x.q.shape[1]
        dw = dw + torch.where(alive > 0, share.abs(), 0.0)
    dp = reference.dropped(x, dw, sequence)
    delta = (p * dp).sum(-1, keepdim=True)
    if d_lse is not None:
        delta = delta + d_lse.masked_fill(l == 0, 0.0).abs()[..., None]
    kept = reference.dropped(x, p, sequence)
    ds = p * (dp + delta)  # of magnitudes: nothing cancels
    ds_spread = p * (spread * (dp + delta) + (p * spread * dp).sum(-1, keepdim=True))
    cap = 1.0 if d_cap is None else d_cap
    scale = abs(x.scale)

    def rows(t: Tensor) -> Tensor:
        return t @ keys * scale

    def columns(t: Tensor) -> Tensor:
        return reference.per_key_head(x, t.transpose(-1, -2) @ q) * scale

    def by_value(t: Tensor) -> Tensor:
        return reference.per_key_head(x, t.transpose(-1, -2) @ g)

    residuals = reference.forward_sequence(x, sequence)
    found = reference.backward_sequence(x, residuals, d_out, d_lse, d_weights, True, sequence)
    parts = {
        "dq": (rows(ds * cap), rows(ds_spread), rows(alive)),
        "dk": (columns(ds * cap), columns(ds_spread), columns(alive)),
        "dv": (by_value(kept), by_value(kept * spread), by_value(alive)),
    }
    if x.bias is not None:
        shape = x.bias.shape
        parts["d_bias"] = (ds.sum_to_size(shape), ds_spread.sum_to_size(shape), alive.sum_to_size(shape))
    exact = dict(zip(("dq", "dk", "dv", "d_bias"), found, strict=True))
    return {n: Exact(exact[n], a, b, f, gradient=True) for n, (a, b, f) in parts.items()}  # type: ignore[arg-type]


def _score_errors(x: Operands, s: Tensor, d_cap: Tensor | None) -> Tensor:
    """The rounding error of each score in units of eps; 0 where hidden, and where a huge bias absorbs the rest."""
    q, k, _ = reference.within_lengths(x)
    error = q.abs() @ reference.per_query_head(x, k.abs()).transpose(-1, -2) * abs(x.scale)
    error = error * (1 + q.shape[-1] ** 0.5 / 8)  # a sum of D terms rounds D times, at random
    if d_cap is not None:
        error = error * d_cap + x.softcap
    if x.alibi_slopes is not None:
        error = error + x.alibi_slopes.abs()[:, :, None, None] * masks.distances(x, s.shape[2], s.shape[3])
    if x.bias is not None:
        error = torch.where(s == x.bias, 0.0, error + x.bias.abs())
    return torch.where(s.isfinite(), error, 0.0)


def _row_max(t: Tensor) -> Tensor:
    return t.amax(-1) if t.shape[-1] else t.new_zeros(t.shape[:-1])


def _alive(s: Tensor, l: Tensor) -> Tensor:
    return ((s != reference.NEG_INF) & (l != 0)[..., None]).to(s.dtype)


def _packed(x: Operands, gradients: Gradients) -> dict[str, Exact]:
    """The sequences' results joined; rows of no sequence are dead: exactly 0, lse -inf."""
    out = x.q.new_zeros(*x.q.shape[:3], x.v.shape[3])
    like = {"out": out, "lse": out[..., 0], "m": out[..., 0], "l": out[..., 0]}
    if gradients[0] is not None:
        like |= {"dq": x.q, "dk": x.k, "dv": x.v}
    whole = {n: Exact(t, t, t, t, gradient=n[0] == "d").map(torch.zeros_like) for n, t in like.items()}
    for name in ("lse", "m"):
        whole[name].value.fill_(reference.NEG_INF)
    for n, at_q, at_k, part in reference.sequences(x):
        d_out, d_lse, d_weights = (None if g is None else g[:, :, at_q] for g in gradients)
        for name, found in _dense(part, (d_out, d_lse, d_weights), "", n).items():
            at = at_k if name in ("dk", "dv") else at_q
            for total, here in zip(whole[name].tensors, found.tensors, strict=True):
                total[:, :, at] = here
    return whole
