"""Which memory the Triton kernels touch: every input, output and intermediate lies between guards."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attn.backends import load
from attn.spec import DecodeOperands, Operands
from attn.testing import Case
from attn.testing.matrix import situation
from attn.triton_kernels import config

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="guard pages need POSIX")
TRITON = load("triton")
CANARY, MARGIN = 0xA5, 256


class Fence(TorchDispatchMode):
    """New tensors end right before an unmapped page and begin after known bytes: an access past the end ends the
    process, a write before the start shows in `check`."""

    MAKERS = ("empty", "empty_strided", "new_empty", "new_empty_strided", "zeros", "new_zeros", "clone")

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[mmap.mmap, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return self.fenced(made) if func.overloadpacket.__name__ in self.MAKERS else made

    def fenced(self, t: Tensor) -> Tensor:
        """A copy of t, strides included, between guards."""
        spans = [(n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)]
        size = (1 + sum(spans)) * t.element_size() if t.numel() else 0
        page = mmap.PAGESIZE
        room = -(-(size + MARGIN) // page) * page
        memory = mmap.mmap(-1, room + page)
        memory[: room - size] = bytes([CANARY]) * (room - size)
        self.kept.append((memory, room - size))
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(base + room), ctypes.c_size_t(page), 0):
            raise OSError("mprotect failed")
        if not size:
            return t
        flat = torch.frombuffer(memory, dtype=t.dtype, count=size // t.element_size(), offset=room - size)
        return flat.as_strided(t.shape, t.stride()).copy_(t)

    def check(self) -> None:
        """Raise AssertionError where something was written before the start of a tensor."""
        for memory, size in self.kept:
            assert memory[:size] == bytes([CANARY]) * size, "written before the start of a tensor"


def status(run: Callable[[Fence], object]) -> int:
    """How a process ends that runs this between fences: 0 where no guard was touched."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    faulthandler.disable()
    try:
        with Fence() as fence:
            run(fence)
        fence.check()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def fenced_fields(x: Any, fence: Fence) -> Any:
    """x with all its tensors between guards."""
    return x._replace(**{n: fence.fenced(t) for n, t in x._asdict().items() if isinstance(t, Tensor)})


def run_case(case: Case, fence: Fence) -> None:
    """All passes of a case."""
    x = fenced_fields(case.operands(), fence)
    if isinstance(x, DecodeOperands):
        TRITON.decode(x)
        return
    residuals = TRITON.forward(x)
    if case.spec.weights:
        TRITON.weights(x, residuals[1], residuals[2], case.spec.weights == "mean")
    given = [None if t is None else fence.fenced(t.contiguous()) for t in case.gradients(x)]
    TRITON.backward(x, residuals, *given, case.spec.bias_grad)


def test_a_guard_is_seen() -> None:
    def touched(offset: int) -> int:
        return status(lambda _: ctypes.memset(torch.empty(5).data_ptr() + offset, 0, 1))

    assert touched(19) == 0
    assert touched(20) < 0
    assert touched(-1) == 1


NAMES = ("full", "lengths", "documents_prefix", "bias", "weights_per_head", "varlen_all", "everything")
MORE = (
    *("causal_end", "prefix_window", "keep", "alibi_lengths", "dropout", "weights_bias", "one_each"),
    *("split_keys_pass", "group_of_7", "bias_finfo_min", "varlen_causal"),
)


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_no_access_outside(name: str) -> None:
    dtype = (torch.float32, torch.bfloat16)[len(name) % 2]
    case = situation(name, dtype, seed=3)
    assert status(lambda fence: run_case(case, fence)) == 0


def test_no_access_outside_in_a_single_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "one_pass", lambda *_: True)
    assert status(lambda fence: run_case(situation("causal_end", torch.float32), fence)) == 0


def decoding(paged: bool, **more: Any) -> DecodeOperands:
    cache = torch.randn(5 if paged else 2, 1, 7 if paged else 300, 12)
    table = torch.tensor([[4, 1, 3], [0, 2, 2]], dtype=torch.int32) if paged else None
    lengths = torch.tensor([21, 9] if paged else [300, 33], dtype=torch.int32)
    x = DecodeOperands(torch.randn(2, 3, 2, 12), cache, cache.clone(), lengths, table, scale=0.25)
    return x._replace(**more)


@pytest.mark.parametrize("paged", [False, True])
def test_no_access_outside_when_decoding(paged: bool) -> None:
    x = decoding(paged)
    assert status(lambda fence: TRITON.decode(fenced_fields(x, fence))) == 0


def wild(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


HOSTILE = {
    "lengths": {"key_lengths": wild(1 << 30), "query_lengths": wild(-5)},
    "long query_lengths": {"key_lengths": wild(-(1 << 31)), "query_lengths": wild((1 << 31) - 1)},
    "prefix": {"prefix": wild(1 << 30), "right": 0},
    "negative prefix": {"prefix": wild(-9), "right": 0, "end": True},
    "cu_seqlens": {
        **{"cu_seqlens_q": wild(0, 60, -7, 30), "cu_seqlens_k": wild(50, 20, 1 << 30, 67)},
        **{"max_seqlen_q": 40, "max_seqlen_k": 67},
    },
    "negative cu_seqlens": {
        **{"cu_seqlens_q": wild(-(1 << 31), (1 << 31) - 1, 0), "cu_seqlens_k": wild(-1, -2, -3)},
        **{"max_seqlen_q": 40, "max_seqlen_k": 67, "right": 0, "end": True},
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values_stay_inside(name: str) -> None:
    """What a GPU call cannot check is clamped."""
    x = Operands(torch.randn(1, 2, 40, 16), torch.randn(1, 2, 67, 16), torch.randn(1, 2, 67, 16), scale=0.25)
    x = x._replace(**HOSTILE[name])

    def run(fence: Fence) -> None:
        call = fenced_fields(x, fence)
        residuals = TRITON.forward(call)
        TRITON.backward(call, residuals, fence.fenced(residuals[0]), None, None, False)

    assert status(run) == 0


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("lengths", [(1 << 30, -5), (-(1 << 31), (1 << 31) - 1)])
def test_hostile_decoding_stays_inside(paged: bool, lengths: tuple[int, int]) -> None:
    x = decoding(paged, lengths=wild(*lengths))
    if paged:
        x = x._replace(block_table=torch.tensor([[-1, 99, 2], [1 << 30, -(1 << 31), 0]], dtype=torch.int32))
    assert status(lambda fence: TRITON.decode(fenced_fields(x, fence))) == 0
