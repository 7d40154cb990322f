"""What the Triton kernels promise beside numbers: dropout bits, dead rows, hidden NaN, strides, residuals, memory."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os

import pytest
import torch
from interpreted_cases import situation
from torch import Tensor

import attn
from attn import reference, rng
from attn.backends import load
from attn.spec import DecodeOperands, Operands
from attn.testing import assert_case, assert_close, assert_verdicts, laws, spy

TRITON = load("triton")


def call(L: int = 40, S: int = 67, D: int = 16, H: int = 2, **more: object) -> Operands:
    q, k, v = torch.randn(1, H, L, D), torch.randn(1, H, S, D), torch.randn(1, H, S, D)
    return Operands(q, k, v, scale=D**-0.5)._replace(**more)  # type: ignore[arg-type]


def test_interprets_only_when_forced() -> None:
    q = torch.randn(1, 1, 4, 8)
    with spy() as calls:
        attn.attention(q, q, q)
        attn.attention(q, q, q, backend="triton")
    assert calls[0][0] != "triton"
    assert calls[1] == ("triton", "forward")
    assert "forced" in str(attn.explain(q, q, q).reasons["triton"])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999999])
def test_dropout_keeps_the_same_bits_in_every_pass(p: float) -> None:
    """With q = 0 all probabilities are 1 / S, and what is not 0 was kept; v = the identity shows each one alone."""
    L = S = 72
    seed = torch.tensor([-81985529216486896, 1 << 62], dtype=torch.int64)
    x = call(L, S, S, rng=seed, dropout_p=p, q=torch.zeros(1, 2, L, S))
    x = x._replace(v=torch.eye(S).expand(1, 2, S, S))
    keep = rng.keep_mask(seed, p, 1, 2, L, S)
    out, m, l = TRITON.forward(x)
    assert torch.equal(out != 0, keep)
    assert torch.equal(TRITON.weights(x, m, l, False) != 0, keep)
    dv = TRITON.backward(x, (out, m, l), torch.eye(L).expand(1, 2, L, L), None, None, False)[2]
    assert torch.equal(dv.transpose(-1, -2) != 0, keep)


def test_dead_rows_are_zero_in_both_directions() -> None:
    keep = torch.rand(1, 2, 40, 67) < 0.5
    keep[:, :, 5] = False
    keep[:, 1, 33:] = False
    x = call(keep=keep)
    out, m, l = TRITON.forward(x)
    dead = ~keep.any(-1)
    assert bool((out[dead] == 0).all())
    assert bool((m[dead] == -torch.inf).all())
    assert bool((l[dead] == 0).all())
    assert bool((TRITON.weights(x, m, l, False)[dead] == 0).all())
    d_out = torch.randn_like(out).masked_fill(dead[..., None], torch.inf)
    dq, dk, dv, _ = TRITON.backward(x, (out, m, l), d_out.masked_fill(dead[..., None], 7.0), None, None, False)
    assert bool((dq[dead] == 0).all())
    assert bool(dk.isfinite().all())
    assert bool(dv.isfinite().all())


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    B, H, L, S = shape
    x = Operands(torch.randn(B, H, L, 8), torch.randn(B, H, S, 8), torch.randn(B, H, S, 8))
    out, m, l = TRITON.forward(x)
    assert out.shape == (B, H, L, 8)
    assert bool((out == 0).all())
    assert bool((m == -torch.inf).all())
    assert bool((l == 0).all())
    assert TRITON.weights(x, m, l, True).shape == (B, L, S)
    for t, g in zip((x.q, x.k, x.v), TRITON.backward(x, (out, m, l), out, None, None, False)[:3], strict=True):
        assert g.shape == t.shape
        assert bool((g == 0).all())


@pytest.mark.parametrize("layout", ["transposed", "sliced", "columns", "broadcast", "strided"])
def test_strides(layout: str) -> None:
    assert_case(dataclasses.replace(situation("causal", torch.float32), layout=layout), "triton")


@pytest.mark.parametrize("dims", [(0, 1, 2, 3), (3,), (2,), (0, 1)])
def test_an_output_gradient_with_stride_zero(dims: tuple[int, ...]) -> None:
    x = call()
    residuals = TRITON.forward(x)
    narrow = torch.randn([1 if d in dims else n for d, n in enumerate(residuals[0].shape)])
    wide = narrow.expand_as(residuals[0])
    got = TRITON.backward(x, residuals, wide, None, None, False)
    want = TRITON.backward(x, residuals, wide.contiguous(), None, None, False)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], want[:3], strict=True))


def test_a_row_stride_that_overflows_32_bits_inside_a_tile() -> None:
    rows = torch.empty(1 << 28, dtype=torch.float32)  # never touched between the rows
    q = rows.as_strided((1, 1, 3, 16), (0, 0, 1 << 26, 1)).copy_(torch.randn(1, 1, 3, 16))
    x = call(3, 5, H=1, q=q)
    assert torch.equal(TRITON.forward(x)[0], TRITON.forward(x._replace(q=q.contiguous()))[0])


@pytest.mark.parametrize("kind", ["hidden_nan", "visible_nan"])
@pytest.mark.parametrize("name", ["causal", "documents", "keep"])
def test_nan(name: str, kind: str) -> None:
    assert_case(situation(name, torch.float32, kind=kind), "triton")


@pytest.mark.parametrize("name", ["causal_end", "bias_finfo_min", "lengths", "dropout", "varlen_causal", "weights"])
@pytest.mark.parametrize("way", [("reference", "triton"), ("triton", "reference")])
def test_residuals_are_interchangeable(name: str, way: tuple[str, str]) -> None:
    assert_case(situation(name, torch.float32), *way)


@pytest.mark.parametrize("name", ["causal", "lengths", "bias", "documents"])
def test_conservation_laws(name: str) -> None:
    x = situation(name, torch.float32, kind="normal").operands()
    d_out = torch.randn(*x.q.shape[:3], x.v.shape[3])
    assert_verdicts(laws.check("triton", x, d_out, bias_grad=x.bias is not None), name)


def test_running_mean() -> None:
    x = call(70, 70, right=0)
    x = x._replace(q=torch.zeros_like(x.q))
    assert_verdicts([laws.running_mean(x, TRITON.forward(x)[0])])


def test_a_shift_below_the_maximum_is_accepted() -> None:
    """A kernel may leave m up to 8 ln 2 below the row's maximum, with l to match."""
    x = call(right=0)
    out, m, l = TRITON.forward(x)
    d_out = torch.randn_like(out)
    lower = (out, m - 5.0, l * torch.exp(torch.tensor(5.0)))
    for a, b in zip(
        TRITON.backward(x, lower, d_out, None, None, False)[:3],
        TRITON.backward(x, (out, m, l), d_out, None, None, False)[:3],
        strict=True,
    ):
        assert_close(a, b)


def test_tf32_is_asked_for_where_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from attn.triton_kernels import arguments

    x = call()
    monkeypatch.setattr(arguments, "tf32", lambda: True)
    assert arguments.flags_of(x, x.q, x.k, x.v).PRECISION == "tf32"
    monkeypatch.setattr(arguments, "tf32", lambda: False)
    assert arguments.flags_of(x, x.q, x.k, x.v).PRECISION == "ieee"


def test_hostile_values_stay_inside() -> None:
    """What a GPU call cannot check is clamped: no access outside, finite numbers in the rows that are defined."""
    i32 = {"dtype": torch.int32}
    x = call(key_lengths=torch.tensor([1 << 20], **i32), query_lengths=torch.tensor([-5], **i32))
    out, m, l = TRITON.forward(x)
    assert bool((out == 0).all())
    TRITON.backward(x, (out, m, l), out, None, None, False)
    packed = call(key_lengths=None)._replace(
        cu_seqlens_q=torch.tensor([0, 60, -7, 30], **i32),
        cu_seqlens_k=torch.tensor([50, 20, 1 << 30, 67], **i32),
        max_seqlen_q=40,
        max_seqlen_k=67,
    )
    residuals = TRITON.forward(packed)
    TRITON.backward(packed, residuals, residuals[0], None, None, False)
    cache = torch.randn(3, 1, 8, 16)
    table = torch.tensor([[-1, 99, 2]], **i32)
    q = torch.randn(1, 1, 1, 16)
    step = DecodeOperands(q, cache, cache, torch.tensor([1 << 20], **i32), table, scale=0.25)
    assert bool(TRITON.decode(step)[0].isfinite().all())


def guarded(t: Tensor, kept: list[mmap.mmap]) -> Tensor:
    """A copy of t whose last byte is the last before an unmapped page: reading past it ends the process."""
    page, size = mmap.PAGESIZE, t.numel() * t.element_size()
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + page)
    kept.append(memory)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(base + room), ctypes.c_size_t(page), 0):
        raise OSError("mprotect failed")
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=room - size)
    return flat.view(t.dtype).view(t.shape).copy_(t)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="guard pages need POSIX")
@pytest.mark.parametrize("name", ["full", "lengths", "documents", "keep", "bias", "varlen", "weights"])
def test_nothing_is_read_past_the_end_of_an_input(name: str) -> None:
    case = situation(name, torch.float32, kind="normal", L=37, S=35)
    x = case.operands()
    kept: list[mmap.mmap] = []
    fenced = x._replace(**{n: guarded(t.contiguous(), kept) for n, t in x._asdict().items() if isinstance(t, Tensor)})
    d_out, d_lse, d_weights = case.gradients(x)
    child = os.fork()
    if child == 0:
        failed = 1
        try:
            out = TRITON.forward(fenced)
            gradient = guarded(d_out.contiguous(), kept)
            TRITON.backward(fenced, out, gradient, d_lse, d_weights, fenced.bias is not None)
            failed = 0
        finally:
            os._exit(failed)
    assert os.waitpid(child, 0)[1] == 0


def test_the_lse_is_natural() -> None:
    x = call()
    _, m, l = TRITON.forward(x)
    exact = torch.logsumexp(x.q.double() @ x.k.double().transpose(-1, -2) * x.scale, -1)
    assert_close(reference.lse_of(m, l), exact.to(m.dtype))
