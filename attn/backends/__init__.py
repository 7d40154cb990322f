"""Where backends are listed: one line each, in the order in which the planner asks them."""

from __future__ import annotations

import importlib

from attn.backends.base import Backend

BACKENDS = {
    "cuda": "attn.backends.cuda:CudaBackend",
    "triton": "attn.backends.triton:TritonBackend",
    "cpu": "attn.backends.cpu:CpuBackend",
    "sdpa": "attn.backends.sdpa:SdpaBackend",
    "reference": "attn.backends.reference:ReferenceBackend",
}


_loaded: dict[str, Backend] = {}


def load(name: str) -> Backend:
    """The one object of that backend. Raises ValueError for a name that is not listed."""
    if name in _loaded:
        return _loaded[name]
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; known backends: {', '.join(BACKENDS)}")
    module, _, kind = BACKENDS[name].partition(":")
    made: Backend = getattr(importlib.import_module(module), kind)()
    made.missing = made.available()
    _loaded[name] = made
    return made
