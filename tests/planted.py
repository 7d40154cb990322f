"""Defects to plant into right results: what the tolerances are there to find, and how often they do.

`python tests/planted.py` measures the rates and writes `tests/data/power.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from attn import reference
from attn.spec import Operands
from attn.testing import Case, Exact, Results, cases, compare, oracle

POWER = Path(__file__).parent / "data" / "power.json"
KINDS = ("normal", "large", "shifted", "tiny", "dead", "finfo_min")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = 2026


def committed_cases(dtype: torch.dtype, n: int) -> list[Case]:
    """n cases from one seed, of a moderate size, with a scale > 0 and without dropout."""
    drawn = cases(8 * n, SEED, dtypes=(dtype,), sizes=(2, 3, 5, 8, 16, 17, 33, 48), head_dims=(3, 8, 16, 40, 64))
    fine = [c for c in drawn if c.kind in KINDS and c.spec.scale_positive and not c.spec.dropout and c.Hq <= 6]
    return fine[:n]


def run(x: Operands, case: Case, l_changed: Callable[[Tensor, Tensor], Tensor] | None = None) -> Results:
    """The reference's passes in the case's dtype."""
    out, m, l = reference.forward(x)
    if l_changed is not None:
        l = l_changed(m, l)
    grads = reference.backward(x, (out, m, l), *case.gradients(x), needs_bias_grad=case.spec.bias_grad)
    return Results(out, reference.lse_of(m, l), m, l, None, *grads)


def verdict_names(case: Case, exact: dict[str, Exact], results: Results) -> list[str]:
    """The results that break their bound or gate."""
    found = []
    for name in ("out", "dq", "dk", "dv", "d_bias"):
        t = getattr(results, name)
        if (
            t is not None
            and name in exact
            and not compare(name, t, exact[name], case.gated, dtype=results.out.dtype).passed
        ):
            found.append(name)
    return found


def _last_key_dropped(x: Operands, case: Case) -> Results | None:
    hide = torch.ones(1, 1, 1, x.k.shape[2], dtype=torch.bool)
    hide[..., -1] = False
    if not _sees(x, (..., -1)) or x.k.shape[2] == 1:
        return None
    return run(x._replace(keep=hide if x.keep is None else x.keep & hide), case)


def _scale_off(x: Operands, case: Case) -> Results | None:
    return None if case.kind == "tiny" or x.k.shape[2] == 1 else run(x._replace(scale=x.scale * 1.01), case)


def _causal_off_by_one(x: Operands, case: Case) -> Results | None:
    wider = x._replace(right=x.right + 1)
    if x.right < 0 or torch.equal(_seen(x), _seen(wider)):
        return None
    return run(wider, case)


def _element(name: str) -> Callable[[Operands, Case], Results | None]:
    def defect(x: Operands, case: Case) -> Results | None:
        results = run(x, case)
        t = getattr(results, name).clone()
        index = int(torch.randint(t.numel(), (), generator=torch.Generator().manual_seed(case.seed)))
        flat = t.reshape(-1)
        if not flat[index]:
            return None
        flat[index] *= 1.05
        setattr(results, name, flat.view(t.shape))
        return results

    return defect


def _factor(name: str) -> Callable[[Operands, Case], Results | None]:
    def defect(x: Operands, case: Case) -> Results | None:
        results = run(x, case)
        if not getattr(results, name).any():
            return None
        setattr(results, name, getattr(results, name) * 1.01)
        return results

    return defect


def _delta_forgotten(x: Operands, case: Case) -> Results | None:
    results = run(x, case)
    d_out, d_lse, d_weights = case.gradients(x)
    delta = (d_out.float() * results.out.float()).sum(-1)
    if x.k.shape[2] == 1 or not delta.any():
        return None
    stale = delta if d_lse is None else d_lse + delta
    assert results.m is not None
    assert results.l is not None
    grads = reference.backward(x, (results.out, results.m, results.l), d_out, stale, d_weights, case.spec.bias_grad)
    results.dq, results.dk, results.dv, results.d_bias = grads
    return results


def _log_sum_lost(x: Operands, case: Case) -> Results | None:
    """What m + log l loses in float32 where a float mask is finfo.min throughout: P becomes 1 instead of 1 / N."""
    _, m, l = reference.forward(x)
    if not ((m < -1e37) & (l > 1)).any():
        return None
    return run(x, case, lambda m, l: torch.where(m < -1e37, torch.where(l > 0, 1.0, l), l))


DEFECTS: dict[str, Callable[[Operands, Case], Results | None]] = {
    "last key dropped": _last_key_dropped,
    "scale wrong by 1 %": _scale_off,
    "causal off by one": _causal_off_by_one,
    "one element of out x 1.05": _element("out"),
    "one element of dk x 1.05": _element("dk"),
    "dq x 1.01": _factor("dq"),
    "dv x 1.01": _factor("dv"),
    "delta forgotten": _delta_forgotten,
    "log of the row sum lost": _log_sum_lost,
}


def _seen(x: Operands) -> Tensor:
    s, _, _ = reference.scores(x)
    return s != reference.NEG_INF


def _sees(x: Operands, index: tuple[object, ...]) -> bool:
    return bool(_seen(x)[index].any())  # type: ignore[index]


def power(dtype: torch.dtype, n: int = 40) -> dict[str, list[int]]:
    """defect -> [found, planted] over the committed cases."""
    counts = {name: [0, 0] for name in DEFECTS}
    for case in committed_cases(dtype, n):
        x = case.operands()
        assert isinstance(x, Operands)
        exact = oracle(x, case.gradients(x), "")
        for name, plant in DEFECTS.items():
            results = plant(x, case)
            if results is not None:
                counts[name][0] += bool(verdict_names(case, exact, results))
                counts[name][1] += 1
    return counts


def table() -> str:
    """All rates as JSON, one defect a line."""
    blocks = []
    for dtype in DTYPES:
        lines = ",\n".join(f'    "{name}": {counts}' for name, counts in power(dtype).items())
        blocks.append(f'  "{str(dtype).removeprefix("torch.")}": {{\n{lines}\n  }}')
    return "{\n" + ",\n".join(blocks) + "\n}\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    POWER.write_text(table())
    print(POWER.read_text())
