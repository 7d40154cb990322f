"""What the Triton kernels promise beside numbers: dropout bits, dead rows, hidden NaN, strides, residuals, memory."""

from __future__ import annotations

import dataclasses

import pytest
import stride_zero
import torch

import attn
from attn import reference, rng
from attn.backends import load
from attn.spec import DecodeOperands, Operands
from attn.testing import assert_case, assert_close, assert_verdicts, laws, spy
from attn.testing.matrix import situation

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


@pytest.mark.parametrize("shape", [(0, 2, 1), (2, 2, 0), (2, 0, 1)])
def test_empty_decoding(shape: tuple[int, int, int]) -> None:
    B, H, L = shape
    cache = torch.randn(B, min(H, 1), 9, 8)
    x = DecodeOperands(torch.randn(B, H, L, 8), cache, cache, torch.full((B,), 9, dtype=torch.int32))
    out, lse = TRITON.decode(x)
    assert out.shape == (B, H, L, 8)
    assert lse.shape == (B, H, L)


def test_decoding_without_keys() -> None:
    cache = torch.randn(2, 1, 0, 8)
    out, lse = TRITON.decode(DecodeOperands(torch.randn(2, 2, 1, 8), cache, cache, torch.zeros(2, dtype=torch.int32)))
    assert bool((out == 0).all())
    assert bool((lse == -torch.inf).all())


@pytest.mark.parametrize("layout", ["transposed", "sliced", "columns", "broadcast", "strided"])
def test_strides(layout: str) -> None:
    assert_case(dataclasses.replace(situation("causal", torch.float32), layout=layout), "triton")


@pytest.mark.parametrize("dims", stride_zero.OUTPUT_DIMS)
def test_an_output_gradient_with_stride_zero(dims: tuple[int, ...]) -> None:
    stride_zero.assert_output_gradient(TRITON, call(), dims)


def test_gradients_of_lse_and_weights_with_stride_zero() -> None:
    stride_zero.assert_gradients_of_lse_and_weights(TRITON, call(right=0))


def test_a_row_stride_that_overflows_32_bits_inside_a_tile() -> None:
    rows = torch.empty(1 << 28, dtype=torch.float32)  # never touched between the rows
    q = rows.as_strided((1, 1, 3, 16), (0, 0, 1 << 26, 1)).copy_(torch.randn(1, 1, 3, 16))
    x = call(3, 5, H=1, q=q)
    assert torch.equal(TRITON.forward(x)[0], TRITON.forward(x._replace(q=q.contiguous()))[0])


def test_more_keys_than_the_kernels_count_are_refused() -> None:
    many = torch.randn(1, 1, 1, 16).expand(1, 1, (1 << 29) + 1, 16)
    one = torch.randn(1, 1, 1, 16)
    lengths = torch.tensor([5], dtype=torch.int32)
    for run in (
        lambda: TRITON.forward(Operands(one, many, many)),
        lambda: TRITON.forward(Operands(many, one, one)),
        lambda: TRITON.decode(DecodeOperands(one, many, many, lengths)),
    ):
        with pytest.raises(ValueError, match="count to 536870912"):
            run()


@pytest.mark.parametrize("kind", ["hidden_nan", "visible_nan"])
@pytest.mark.parametrize("name", ["causal", "window", "prefix", "documents", "keep", "alibi_lengths"])
def test_nan(name: str, kind: str) -> None:
    assert_case(situation(name, torch.float32, kind=kind), "triton")


@pytest.mark.parametrize("name", ["lengths", "lengths_end"])
@pytest.mark.parametrize("more", [{"bias": True, "bias_grad": True}, {"dropout": True, "weights": "mean"}], ids=str)
def test_nan_past_the_lengths_reaches_nothing(name: str, more: dict[str, object]) -> None:
    assert_case(situation(name, torch.float32, **{"kind": "past_nan", "L": 33, "S": 35} | more), "triton")


def test_nan_past_the_last_packed_sequence_reaches_nothing() -> None:
    cu = {"cu_seqlens_q": torch.tensor([0, 9, 30]), "cu_seqlens_k": torch.tensor([0, 40, 50])}
    x = call(**{n: t.to(torch.int32) for n, t in cu.items()}, max_seqlen_q=21, max_seqlen_k=40)
    d_out = torch.randn(1, 2, 40, 16)
    clean = TRITON.backward(x, TRITON.forward(x), d_out, None, None, False)
    for t, end in ((x.q, 30), (x.k, 50), (x.v, 50), (d_out, 30)):
        t[:, :, end:] = torch.nan
    residuals = TRITON.forward(x)
    assert bool((residuals[0][:, :, 30:] == 0).all())
    for a, b in zip(TRITON.backward(x, residuals, d_out, None, None, False)[:3], clean[:3], strict=True):
        assert torch.equal(a, b)


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


def test_the_lse_is_natural() -> None:
    x = call()
    _, m, l = TRITON.forward(x)
    exact = torch.logsumexp(x.q.double() @ x.k.double().transpose(-1, -2) * x.scale, -1)
    assert_close(reference.lse_of(m, l), exact.to(m.dtype))
