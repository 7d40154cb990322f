"""The binding of the CUDA library, by the emulated one: what it refuses and makes, and that nobody gets it unasked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attn
from attn import native_cuda, planner
from attn.backends import load
from attn.spec import DecodeOperands, Operands
from attn.testing import spy

BACKEND = load("cuda")


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def operands() -> Operands:
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    return Operands(q, k, v, scale=0.25)


def test_it_works_and_runs_only_where_it_is_asked_for(operands: Operands) -> None:
    assert BACKEND.missing is None
    with spy() as seen:
        attn.attention(*operands[:3])
        attn.attention(*operands[:3], backend="cuda")
    assert [name for name, _ in seen if name == "cuda"] == ["cuda"]
    assert "only when forced" in str(attn.explain(*operands[:3]).reasons["cuda"])
    double = operands.q.double()
    assert "takes bfloat16 or float16 or float32, not float64" in str(
        attn.explain(double, double, double).reasons["cuda"]
    )


def test_schemas_tell_the_truth(operands: Operands) -> None:
    x = operands._replace(key_lengths=int32(5, 3))
    out, m, l = BACKEND.forward(x)
    ops = torch.ops.attn_cuda
    for op, args in (
        (ops.forward, (*x, 1, True)),
        (ops.weights, (m, l, *x, True)),
        (ops.backward, (out, None, None, out, m, l, *x._replace(bias=torch.zeros(1, 1, 5, 5)), True)),
        (ops.decode, (x.q, x.k, x.v, int32(5, 3), None, None, -1, 0, 1.0, 0.0)),
    ):
        torch.library.opcheck(op.default, args, test_utils="test_schema")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 4, 5, 8).double()}, "q must be float32, bfloat16 or float16|must have the dtype of q"),
        ({"k": torch.zeros(2, 4, 5, 8).half()}, "k must have the dtype of q"),
        ({"v": torch.zeros(2, 4, 6, 8)}, "k and v must agree in heads and length"),
        ({"k": torch.zeros(2, 3, 5, 8), "v": torch.zeros(2, 3, 5, 8)}, "q's heads must be a multiple of k's"),
        ({"key_lengths": int32(1)}, r"key_lengths must have shape \(2\)"),
        ({"bias": torch.zeros(2, 4, 5, 6)}, "bias must broadcast"),
        ({"keep": torch.zeros(1, 1, 1, 5)}, "keep must be bool"),
        ({"dropout_p": 0.5}, "rng must be given where dropout_p > 0"),
        ({"dropout_p": 1.5, "rng": torch.zeros(2, dtype=torch.int64)}, "dropout_p is 1.5"),
    ],
)
def test_shapes_and_dtypes_are_checked(operands: Operands, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BACKEND.forward(operands._replace(**changes))


def test_float64_is_refused_by_every_op(operands: Operands) -> None:
    q = operands.q.double()
    m = torch.zeros(2, 4, 5).double()
    x = Operands(q, q, q)
    for run in (
        lambda: BACKEND.forward(x),
        lambda: BACKEND.weights(x, m, m, True),
        lambda: BACKEND.backward(x, (q, m, m), q, None, None, False),
        lambda: BACKEND.decode(DecodeOperands(q, q, q, int32(5, 5))),
    ):
        with pytest.raises(ValueError, match="q must be float32, bfloat16 or float16"):
            run()


def test_residuals_are_none_where_nobody_asked(operands: Operands) -> None:
    out, m, l, w = native_cuda.forward(*operands, 1, False)
    assert m is None
    assert l is None
    assert not out.isnan().any()
    assert w.shape == (2, 5, 5)
    assert not w.isnan().any()
    assert native_cuda.forward(*operands, 0, False)[3] is None


def test_calls_without_queries_or_keys(operands: Operands) -> None:
    for queries, keys in ((0, 5), (5, 0), (0, 0)):
        x = operands._replace(q=operands.q[:, :, :queries], k=operands.k[:, :, :keys], v=operands.v[:, :, :keys])
        out, m, l = BACKEND.forward(x)
        assert out.shape == (2, 4, queries, 8)
        assert not out.any()
        assert not l.any()
        assert bool((m == -torch.inf).all())
        bias = torch.zeros(1, 4, queries, keys)
        grads = BACKEND.backward(x._replace(bias=bias), (out, m, l), out, None, None, True)
        assert [g is not None and not g.any() for g in grads] == [True] * 4


def test_packed_tokens_of_no_sequence_are_dead() -> None:
    q = torch.randn(1, 4, 70, 8)
    nothing = Operands(q, q, q, alibi_slopes=torch.ones(0, 4), cu_seqlens_q=int32(0), cu_seqlens_k=int32(0))
    out, m, l = BACKEND.forward(nothing)
    assert not out.any()
    assert not l.any()
    assert bool((m == -torch.inf).all())
    assert not any(bool(t.any()) for t in BACKEND.backward(nothing, (out, m, l), q, None, None, False)[:3])


def test_a_bias_in_float64_is_read_and_gets_its_gradient(operands: Operands) -> None:
    bias = torch.randn(1, 4, 5, 5).requires_grad_()
    exact = bias.detach().double().requires_grad_()
    for each in (bias, exact):
        attn.attention(*operands[:3], bias=each, backend="cuda").square().sum().backward()
    assert bias.grad is not None
    assert exact.grad is not None
    assert exact.grad.dtype == torch.float64
    assert torch.equal(exact.grad.float(), bias.grad)


def test_lazy_negation_and_subclasses_are_resolved(operands: Operands) -> None:
    q, k, v = operands[:3]
    expected = attn.attention(q, k, v, backend="cuda")
    assert torch.equal(attn.attention(torch._neg_view(-q), k, v, backend="cuda"), expected)
    k.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="its storage was freed"):
        attn.attention(q, k, v, backend="cuda")


def test_a_library_of_another_version_is_not_called() -> None:
    code = (
        "import pathlib, sys, types, torch, attn\n"
        "path = pathlib.Path(attn.__path__[0], 'native.py')\n"
        "old, new = 'bool residuals) -> ', 'bool residuals, int more) -> '\n"
        "text = path.read_text()\n"
        "assert old in text\n"
        "native = types.ModuleType('attn.native')\n"
        "native.__file__ = str(path)\n"
        "sys.modules['attn.native'] = attn.native = native\n"
        "exec(text.replace(old, new), native.__dict__)\n"
        "from attn import native_cuda\n"
        "from attn.spec import Operands\n"
        "assert native_cuda.load() is None\n"
        "native_cuda.forward(*Operands(*torch.randn(3, 1, 1, 2, 8)), 0, True, 7)\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(attn.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ValueError: attn_cuda: the library is not that of these Python files" in done.stderr


def test_compiled_calls_run_it(operands: Operands) -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def run(q: Tensor) -> Tensor:
        out = attn.attention(q, operands.k, operands.v, backend="cuda")
        assert isinstance(out, Tensor)
        return out

    assert torch.equal(run(operands.q), attn.attention(*operands[:3], backend="cuda"))


def test_the_planner_never_takes_the_emulator() -> None:
    planner.forget()
    q = torch.randn(1, 2, 3, 4)
    assert attn.explain(q, q, q).chosen != "cuda"
