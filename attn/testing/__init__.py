"""What attention results are tested with: tolerances, an oracle, cases, laws, a spy. Needs torch alone.

| you have | use |
| --- | --- |
| out, lse, weights, gradients | `exact = oracle(x, gradients, weights)`, `assert_forward`, `assert_gradients` |
| two modules, one of them PyTorch's | `assert_module_close(ours, exact, stock)` for each output and gradient |
| two computations of one thing | `assert_close(actual, expected)` |
| no reference at that size | `laws.check(backend, x)` |
| a kernel and random calls | `cases(n, seed)`, `assert_case(case, backend)` |
| a call as users write it | `assert_public_case(case)`: by `attn.attention` and autograd |
| memory to watch | `PoisonedEmpty()`, `Guarded()` |
| a bug report | `Case.parse(line)`, and `pytest --case "line"` |
| a doubt about what ran | `with spy() as calls: ...` |
"""

from __future__ import annotations

from attn.testing import laws
from attn.testing.cases import Case, cases
from attn.testing.observe import Guarded, PoisonedEmpty, spy
from attn.testing.oracle import NO_GRADIENTS, assert_forward, assert_gradients, in_double, oracle
from attn.testing.public import assert_public_case
from attn.testing.run import Results, assert_case, check, judge, judge_residuals, run_case
from attn.testing.tolerance import (
    Exact,
    Verdict,
    assert_close,
    assert_module_close,
    assert_verdicts,
    compare,
    units,
)

__all__ = [
    "NO_GRADIENTS",
    "Case",
    "Exact",
    "Guarded",
    "PoisonedEmpty",
    "Results",
    "Verdict",
    "assert_case",
    "assert_close",
    "assert_forward",
    "assert_gradients",
    "assert_module_close",
    "assert_public_case",
    "assert_verdicts",
    "cases",
    "check",
    "compare",
    "in_double",
    "judge",
    "judge_residuals",
    "laws",
    "oracle",
    "run_case",
    "spy",
    "units",
]
