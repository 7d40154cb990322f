"""What every backend is: a capability as data, a sentence when it cannot, and the passes it runs.

A backend never sees a call that its own `why_not` refuses, and nobody else knows its limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attn.backends import proven
from attn.spec import AttentionSpec, DecodeOperands, Operands

Forward = tuple[Tensor, Tensor, Tensor]
"""(out, m, l): out (B, Hq, L, Dv) laid out in memory as (B, L, Hq, Dv); m, l (B, Hq, L) contiguous float32
(float64 for float64): a finite shift per row in natural units, at most 8 ln 2 below the row's maximum score, and the
row sum of exp(s - m). A dead row has out 0, m -inf, l 0."""

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""(dq, dk, dv, d_bias), each in the dtype of its input; dq, dk, dv laid out in memory as (B, L, H, D), d_bias
contiguous in the 4-D shape of `Operands.bias`, or None where it is not asked for."""

FEATURES = {  # spec field -> the words of the refusal
    "grouped": "grouped-query heads",
    "band": "causal or window masks",
    "prefix": "prefix masks",
    "key_lengths": "key lengths",
    "query_lengths": "query lengths",
    "documents": "document masks",
    "keep": "dense bool masks",
    "bias": "a bias or dense float mask",
    "bias_grad": "the gradient of a bias",
    "alibi": "ALiBi",
    "softcap": "softcap",
    "dropout": "dropout",
    "paged": "a paged cache",
    "lse": "returning the lse",
    "weights": "returning attention weights",
    "grad": "gradients",
    "deterministic": "deterministic gradients",
}
ALL = frozenset(FEATURES)


class _AnyDevice(frozenset[str]):
    def __contains__(self, device: object) -> bool:
        return True


ANY_DEVICE = _AnyDevice()
"""For backends written in torch: every device type that torch has."""


@dataclass(frozen=True)
class Capability:
    """What a backend can run. `features` names the fields of `AttentionSpec` (keys of FEATURES) that may be set."""

    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    ops: frozenset[str] = frozenset({"attention", "varlen", "decode"})
    features: frozenset[str] = ALL
    max_head_dim: int = 256
    value_dim_differs: bool = True
    oldest_sm: int = 0
    """Of NVIDIA GPUs, the oldest compute capability, 80 for 8.0."""


class Backend:
    """Base of all backends; `forward`, `backward`, `weights` and `decode` are what a kernel backend provides."""

    name: ClassVar[str]
    capability: ClassVar[Capability]
    whole_call: ClassVar[bool] = False  # provides `call`, with PyTorch's autograd, instead of the passes
    needs_proof: ClassVar[bool] = False  # on a GPU: chosen by itself only where committed results passed
    missing: str | None = None  # what `available` said when the backend was loaded
    warned = False  # whether an unproven use has been reported

    def available(self) -> str | None:
        """None where this backend can work on this machine, else one sentence: what is missing and the cure."""
        return None

    def refuses(self, spec: AttentionSpec) -> str | None:
        """What the capability table cannot say; overridden by backends with such limits."""
        return None

    def why_not(self, spec: AttentionSpec) -> str | None:
        """None if this backend can run `spec`, else one sentence that says why not."""
        able = self.capability
        if self.missing is not None:
            return self.missing
        if spec.device not in able.devices:
            return f"runs on {_listed(able.devices)}, not on {spec.device}"
        if spec.dtype not in able.dtypes:
            names = _listed(str(d).removeprefix("torch.") for d in able.dtypes)
            return f"takes {names}, not {str(spec.dtype).removeprefix('torch.')}"
        if spec.op not in able.ops:
            return f"does not do {spec.op} calls"
        largest = max(spec.head_dim, spec.value_dim)
        if largest > able.max_head_dim:
            return f"takes head_dim up to {able.max_head_dim}, not {largest}"
        if spec.head_dim != spec.value_dim and not able.value_dim_differs:
            return f"needs equal head dims, not {spec.head_dim} for query and {spec.value_dim} for value"
        if spec.sm is not None and spec.sm < able.oldest_sm:
            return f"needs compute capability {able.oldest_sm / 10} or newer, not {spec.arch}"
        for name, words in FEATURES.items():
            if getattr(spec, name) and name not in able.features:
                return f"does not do {words}"
        return self.refuses(spec)

    def unproven(self, spec: AttentionSpec) -> str | None:
        """Why the planner may not take this backend by itself although it could run (`use_backend` still may)."""
        if not self.needs_proof or spec.device == "cpu":
            return None
        return proven.why_not(self.name, spec)

    def only_forced(self, spec: AttentionSpec) -> str | None:
        """Why the planner leaves this backend to `backend=` and `use_backend` (an interpreter is no kernel)."""
        return None

    def forward(self, x: Operands) -> Forward:
        """out and the residuals m, l (abstract)."""
        raise NotImplementedError(f"backend {self.name} has no forward pass of its own")

    def infer(self, x: Operands, weights: str) -> tuple[Tensor, Tensor | None]:
        """(out, weights or None) for a call that needs neither gradients nor the lse."""
        if weights:
            out, _, _, w = self.forward_weights(x, weights == "mean")
            return out, w
        return self.forward(x)[0], None

    def weights(self, x: Operands, m: Tensor, l: Tensor, average: bool) -> Tensor:
        """Probabilities after dropout from the residuals, in q's dtype: (B, L, S) or (B, Hq, L, S) (abstract)."""
        raise NotImplementedError(f"backend {self.name} returns no weights")

    def forward_weights(self, x: Operands, average: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Forward and weights together; a backend that can share work between them overrides this."""
        out, m, l = self.forward(x)
        return out, m, l, self.weights(x, m, l, average)

    def backward(
        self,
        x: Operands,
        residuals: Forward,
        d_out: Tensor,
        d_lse: Tensor | None,
        d_weights: Tensor | None,
        needs_bias_grad: bool,
    ) -> Gradients:
        """Gradients from what forward left; `d_weights` has 3 dims if averaged, 4 per head (abstract)."""
        raise NotImplementedError(f"backend {self.name} has no backward pass of its own")

    def decode(self, x: DecodeOperands) -> tuple[Tensor, Tensor]:
        """(out (B, Hq, Lq, Dv), lse (B, Hq, Lq) float32) (abstract)."""
        raise NotImplementedError(f"backend {self.name} does not decode")

    def call(self, spec: AttentionSpec, x: Operands) -> Tensor:
        """Whole-call backends only: out, recorded by PyTorch's own autograd (abstract)."""
        raise NotImplementedError(f"backend {self.name} works by passes, not by whole calls")

    def tile(self, spec: AttentionSpec) -> tuple[int, int]:
        """(queries, keys) of the tile it would use: tests take their boundary lengths from it."""
        return 64, 64


observers: list[list[tuple[str, str]]] = []
"""Lists to which every pass that runs is appended as (backend, pass): how tests prove which backend served."""


def record(backend: str, what: str) -> None:
    """Tell the observers that a backend runs "forward", "backward", "decode", or a whole "call"."""
    for seen in observers:
        seen.append((backend, what))


def _listed(words: object) -> str:
    return " or ".join(sorted(words))  # type: ignore[call-overload]


def as_rows(t: Tensor) -> Tensor:
    """t (B, H, L, D) in the memory layout (B, L, H, D); a copy only where it has another."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)
