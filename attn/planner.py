"""Which backend runs a call: the first one in order that says yes, unless the caller forces one.

Precedence: `backend=` of the call, the innermost `use_backend`, the module's own, the planner's order. A forced backend
never falls back: it runs or its sentence is raised.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn.backends import BACKENDS, load
from attn.backends.base import Backend
from attn.spec import AttentionSpec

log = logging.getLogger("attn")


class _State:
    """Plain process-wide state: torch.compile guards this, and neither a ContextVar nor a thread-local."""

    forced: str | None = None


state = _State()
_plans: dict[tuple[AttentionSpec, str | None], Backend] = {}
_plain_calls: dict[tuple[Any, ...], tuple[AttentionSpec, Backend]] = {}
_LARGEST_CACHE = 4096


for _name in BACKENDS:  # now: importing is no work for a call that torch.compile traces
    load(_name)


def names() -> tuple[str, ...]:
    """All backends, in the order in which they are asked."""
    return tuple(BACKENDS)


def available_backends() -> tuple[str, ...]:
    """The backends that can work on this machine, in the order in which they are asked."""
    return tuple(name for name in BACKENDS if load(name).missing is None)


class use_backend:
    """Force one backend for every call inside the block, in the whole process; it never falls back.

    Raises ValueError for an unknown name at once, and RuntimeError at a call that the backend cannot run.

    >>> with use_backend("reference"):
    ...     state.forced
    'reference'
    """

    def __init__(self, name: str) -> None:
        load(name)
        self.name = name
        self._outer: list[str | None] = []

    def __enter__(self) -> None:
        self._outer.append(state.forced)
        state.forced = self.name

    def __exit__(self, *exc: object) -> None:
        state.forced = self._outer.pop()


def choose(spec: AttentionSpec, backend: str | None = None, default: str | None = None) -> Backend:
    """The backend that runs `spec`. `backend` is the call's own wish, `default` the module's.

    Raises ValueError for an unknown name and RuntimeError where a forced backend cannot run the call.
    """
    wish = backend or state.forced or default
    if wish is not None and not isinstance(wish, str):
        raise TypeError(f"backend is {type(wish).__name__}; give a name, one of {', '.join(BACKENDS)}")
    if torch.compiler.is_compiling():
        return _choose(spec, wish)
    found = _plans.get((spec, wish))
    if found is None:
        found = _choose(spec, wish)
        if len(_plans) >= _LARGEST_CACHE:
            _plans.clear()
        _plans[spec, wish] = found
        log.debug("%s runs %s", found.name, spec)
    return found


def plain_key(q: Tensor, k: Tensor, v: Tensor, *wishes: Any) -> tuple[Any, ...] | None:
    """All that checking and planning look at in a call of three tensors and some wishes; None where not to be cached.

    A plain call that passed once is neither checked nor planned again: on small tensors that costs more than attention.
    """
    if torch.compiler.is_compiling() or not (type(q) is type(k) is type(v) is Tensor):
        return None
    try:
        hash(wishes)
    except TypeError:  # an argument of the wrong kind, which the checks will name
        return None
    if q.is_nested or k.is_nested or v.is_nested or torch._C._is_any_autocast_enabled():
        return None
    if torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active():
        return None  # sizes are tensors there; requires_grad does not show
    shapes = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device)
    layouts = (q.layout, k.layout, v.layout)
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return (shapes, layouts, grad, torch.are_deterministic_algorithms_enabled(), state.forced, wishes)


def recall(key: tuple[Any, ...] | None) -> tuple[AttentionSpec, Backend] | None:
    """What `remember` was told of this key."""
    return None if key is None else _plain_calls.get(key)


def remember(key: tuple[Any, ...], spec: AttentionSpec, backend: Backend) -> None:
    """Keep the outcome of a call that was checked and planned."""
    if len(_plain_calls) >= _LARGEST_CACHE:
        _plain_calls.clear()
    _plain_calls[key] = (spec, backend)


def forget() -> None:
    """Drop every plan, after the list of backends or their abilities changed."""
    _plans.clear()
    _plain_calls.clear()


def _choose(spec: AttentionSpec, wish: str | None) -> Backend:
    if wish is not None:
        return _forced(spec, load(wish))
    for name in BACKENDS:
        candidate = load(name)
        if candidate.why_not(spec) is None and candidate.unproven(spec) is None and not candidate.only_forced(spec):
            return candidate
    raise RuntimeError(f"no backend can run this call: {spec}\n{explain_spec(spec)}")


def _forced(spec: AttentionSpec, backend: Backend) -> Backend:
    reason = backend.why_not(spec)
    if reason is not None:
        raise RuntimeError(
            f"backend {backend.name!r} was asked for and cannot run this call: {reason}. The call: {spec}. "
            f"Cure: another backend ({', '.join(n for n in BACKENDS if n != backend.name)}), or none to let attn choose"
        )
    doubt = backend.unproven(spec)
    if doubt is not None and not backend.warned:
        backend.warned = True
        warnings.warn(f"backend {backend.name!r} runs because it was asked for, although {doubt}", stacklevel=4)
    return backend


@dataclass(frozen=True)
class Explanation:
    """What the planner does with a call. Prints as a table."""

    spec: AttentionSpec
    chosen: str | None
    """The backend that runs it; None where a forced backend cannot."""
    reasons: Mapping[str, str | None]
    """For each backend in order, one sentence that says why it does not run this call; None for the chosen one."""

    def __str__(self) -> str:
        width = max(map(len, self.reasons))
        rows = [f"{n:{width}}  {'runs this call' if r is None else r}" for n, r in self.reasons.items()]
        return "\n".join([str(self.spec), *rows])


def explain_spec(spec: AttentionSpec, backend: str | None = None) -> Explanation:
    """Why each backend runs or does not run `spec`, with `backend` forced if given."""
    wish = backend or state.forced
    if wish is not None:
        load(wish)
    chosen: str | None = None
    reasons: dict[str, str | None] = {}
    for name in BACKENDS:
        candidate = load(name)
        reason = candidate.why_not(spec)
        if reason is None and wish is not None and name != wish:
            reason = f"could, but {wish} was asked for"
        elif reason is None and wish is None:
            reason = candidate.unproven(spec) or candidate.only_forced(spec)
            if reason is None and chosen is not None:
                reason = f"could, but {chosen} comes first"
        if reason is None:
            chosen = name
        reasons[name] = reason
    return Explanation(spec, chosen, reasons)
