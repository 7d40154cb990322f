"""Where a GPU kernel has passed: nothing unproven runs by accident.

An entry is written when the results of the GPU suite from that architecture are committed under
`benchmarks/results/`. Until then the planner passes such a backend by, `use_backend` and `backend=` still force it,
and the first forced call warns.
"""

from __future__ import annotations

import torch

from attn.spec import AttentionSpec

PROVEN: frozenset[tuple[str, str, torch.dtype, str]] = frozenset()
"""(backend, arch, dtype, pass), pass one of "forward", "backward", "decode". Empty: no kernel has run on hardware."""


def passes(spec: AttentionSpec) -> tuple[str, ...]:
    """The passes that a call of this spec runs."""
    if spec.op == "decode":
        return ("decode",)
    return ("forward", "backward") if spec.grad else ("forward",)


def why_not(backend: str, spec: AttentionSpec) -> str | None:
    """None if every pass of `spec` is proven for `backend` on this architecture, else one sentence with the cure."""
    missing = [p for p in passes(spec) if (backend, spec.arch, spec.dtype, p) not in PROVEN]
    if not missing:
        return None
    where = spec.arch or spec.device
    return (
        f"no committed results show its {' and '.join(missing)} pass right on {where} "
        f"({str(spec.dtype).removeprefix('torch.')}); force it with backend={backend!r}"
    )
