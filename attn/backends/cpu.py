"""The C++ kernels as a backend: every feature on CPU tensors, on the instruction set that the CPU has.

ATTN_CPU_ISA (amx, avx512bf16, avx512, avx2, neon, portable) forces one; the same bits come out whatever the number of
threads. Values that point somewhere (lengths, cu_seqlens, page tables) are checked where they are read, so that a call
that torch.compile made, which nobody else checked, is refused too and reads nothing outside its tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn import native
from attn.backends.base import Backend, Capability, Forward, Gradients
from attn.spec import AttentionSpec, DecodeOperands, Operands

SLOWER = frozenset(
    {
        *((isa, torch.float64, "inference") for isa in native.SETS),  # one plain float64 kernel serves them all
        ("avx512", torch.bfloat16, "inference"),
        ("portable", torch.float32, "inference"),
        ("portable", torch.float32, "training"),
        ("portable", torch.bfloat16, "inference"),
        ("portable", torch.float16, "inference"),
    }
)
"""(instruction set, dtype, kind of call) in which `sdpa` was measured to be faster, by the geometric mean over lengths:
there the planner leaves calls that `sdpa` serves to it. On avx2, avx512 and amx every other kind was faster here, on
avx512bf16 on the CPUs that take it by themselves; neon, which has not run on hardware, is taken to be like avx2."""


class CpuBackend(Backend):
    """Runs `csrc/cpu/`."""

    name = "cpu"
    capability = Capability(
        devices=frozenset({"cpu"}),
        dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
    )

    def available(self) -> str | None:
        """None where the library was built and loads."""
        return native.load()

    def only_forced(self, spec: AttentionSpec) -> str | None:
        """Where it was measured to be the slower one."""
        if spec.op != "attention" or spec.dropout or spec.softcap or spec.lse or spec.weights:
            return None  # sdpa has no such calls
        what = "training" if spec.grad else "inference"
        if (native.isa, spec.dtype, what) not in SLOWER:
            return None
        name = str(spec.dtype).removeprefix("torch.")
        return f"is slower than PyTorch's own in {name} {what} on {native.isa}; backend='cpu' runs it all the same"

    def forward(self, x: Operands) -> Forward:
        """See `Backend.forward`."""
        out, m, l, _ = _forward(x, native.NO_WEIGHTS)
        return out, m, l

    def infer(self, x: Operands, weights: str) -> tuple[Tensor, Tensor | None]:
        """Without residuals, weights in the same pass."""
        wanted = native.WEIGHTS[weights]
        if not _is_plain(x):
            out, _, _, w = native.forward(*x, wanted, False)
            return out, w
        if not wanted:
            return native.infer(x.q, x.k, x.v, x.left, x.right, x.end, x.scale, x.softcap), None
        out, w = native.infer_weights(x.q, x.k, x.v, x.left, x.right, x.end, x.scale, x.softcap, wanted)
        return out, w

    def weights(self, x: Operands, m: Tensor, l: Tensor, average: bool) -> Tensor:
        """See `Backend.weights`."""
        result: Tensor = native.weights(m, l, *x, average)
        return result

    def forward_weights(self, x: Operands, average: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One pass for both."""
        return _forward(x, native.MEAN if average else native.HEADS)

    def backward(
        self,
        x: Operands,
        residuals: Forward,
        d_out: Tensor,
        d_lse: Tensor | None,
        d_weights: Tensor | None,
        needs_bias_grad: bool,
    ) -> Gradients:
        """See `Backend.backward`."""
        result: Gradients
        if d_lse is None and d_weights is None and _is_plain(x):
            numbers = (x.left, x.right, x.end, x.scale, x.softcap)
            result = native.plain_backward(d_out, *residuals, x.q, x.k, x.v, *numbers)
        else:
            result = native.backward(d_out, d_lse, d_weights, *residuals, *x, needs_bias_grad)
        return result

    def decode(self, x: DecodeOperands) -> tuple[Tensor, Tensor]:
        """See `Backend.decode`."""
        result: tuple[Tensor, Tensor] = native.decode(*x)
        return result


def _forward(x: Operands, weights: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, m, l, weights; None in their place where they are not asked for."""
    result: tuple[Tensor, Tensor, Tensor, Tensor]
    if _is_plain(x):
        result = native.plain(x.q, x.k, x.v, x.left, x.right, x.end, x.scale, x.softcap, weights)
    else:
        result = native.forward(*x, weights, True)
    return result


def _is_plain(x: Operands) -> bool:
    """Whether q, k and v are all its tensors."""
    _, _, _, bias, keep, slopes, key_lengths, query_lengths, ids, _, prefix, packed, _, rng, *_ = x
    return (
        bias is None
        and keep is None
        and slopes is None
        and key_lengths is None
        and query_lengths is None
        and ids is None
        and prefix is None
        and packed is None
        and rng is None
    )
