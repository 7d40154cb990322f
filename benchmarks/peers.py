"""Who is timed in calls of the functions: our backends, PyTorch's kernels one by one, and libraries where installed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

import attn
from attn import planner
from attn.backends import load
from attn.benchmarks import peers_libraries, peers_torch
from attn.benchmarks.problem import Absent, Call, Problem, batched, packed
from attn.spec import AttentionSpec, DecodeOperands
from attn.testing.public import decode_options, mask_of

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


ONLY_ON_GPU = ("sdpa cudnn", "sdpa efficient")
PEERS: dict[str, Callable[[Problem], Call]] = {
    **dict.fromkeys(SDPA, peers_torch.sdpa),
    "flex": peers_torch.flex,
    "flash-attn": peers_libraries.flash_attn,
    "flash-attn-4": peers_libraries.flash_attn_4,
    "xformers": peers_libraries.xformers,
}


@dataclass
class Contender:
    """Somebody who is timed. `call` returns the output, `inside` is entered around its calls, not while timing."""

    name: str
    call: Call
    ours: bool = False
    inside: Callable[[], contextlib.AbstractContextManager[Any]] = field(default=contextlib.nullcontext)


def contenders(p: Problem, backends: tuple[str, ...], peers: tuple[str, ...]) -> tuple[list[Contender], dict[str, str]]:
    """Those that can take part, ours first, and why each of the others does not. Empty tuples: everyone."""
    found: list[Contender] = []
    absent: dict[str, str] = {}
    for name in backends or own_backends(p.spec):
        reason = load(name).why_not(p.spec)
        if reason is None:
            found.append(Contender(f"attn {name}", ours(p, name), ours=True))
        else:
            absent[f"attn {name}"] = reason
    for name, build in PEERS.items():
        if peers and name not in peers:
            continue
        if name == "flex" and p.spec.device == "cpu" and not peers:
            absent[name] = "compiles for half a minute on a CPU: --peer flex asks for it"
            continue
        if p.spec.device == "cpu" and name in ONLY_ON_GPU:
            absent[name] = "runs on a GPU only"
            continue
        try:
            call = build(p)
        except Absent as why:
            absent[name] = str(why)
            continue
        inside = functools.partial(sdpa_kernel, SDPA[name]) if name in SDPA else contextlib.nullcontext
        found.append(Contender(name, call, inside=inside))
    return found, absent


def own_backends(spec: AttentionSpec) -> tuple[str, ...]:
    """Our kernels that can run a call; where there are none, whatever the planner takes."""
    kernels = [name for name in planner.names() if name not in ("sdpa", "reference")]
    able = [n for n in kernels if load(n).why_not(spec) is None and load(n).only_forced(spec) is None]
    return tuple(able) or (planner.choose(spec).name,)


def ours(p: Problem, backend: str) -> Call:
    """The public function of that kind of call."""
    x = p.x
    if isinstance(x, DecodeOperands):
        options = decode_options(x)
        return lambda: attn.decode_attention(x.q, x.k_cache, x.v_cache, backend=backend, **options)
    common: dict[str, Any] = {"scale": x.scale, "softcap": x.softcap or None, "alibi_slopes": x.alibi_slopes}
    common |= {"backend": backend, "mask": mask_of(x._replace(cu_seqlens_q=None, cu_seqlens_k=None))}
    if x.cu_seqlens_q is None:
        return lambda: attn.attention(x.q, x.k, x.v, bias=x.bias, **common)
    common |= {"cu_seqlens_q": x.cu_seqlens_q, "cu_seqlens_k": x.cu_seqlens_k}
    common |= {"max_seqlen_q": x.max_seqlen_q, "max_seqlen_k": x.max_seqlen_k}
    return lambda: batched(attn.varlen_attention(*packed(x), **common))
