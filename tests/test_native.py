"""The compiled library: its instruction sets and forks, what it refuses, and that nobody is served less."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from same_bits import same_bits
from torch import Tensor

import attn
from attn import native, planner
from attn.backends import load
from attn.spec import AttentionSpec, DecodeOperands, Operands
from attn.testing import assert_case, cases

EXPECTED = [name for name in os.environ.get("ATTN_EXPECT", "").split(",") if name]
"""Backends that a run is there to test: without this, a library that does not load would pass unseen."""

loaded = pytest.mark.skipif(native.load() is not None, reason=str(native.load()))


@pytest.mark.parametrize("name", EXPECTED)
def test_expected_backends_work_here(name: str) -> None:
    assert load(name).missing is None


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@loaded
@pytest.mark.parametrize("isa", native.usable())
@pytest.mark.parametrize("part", range(3))
def test_random_cases_on_every_instruction_set(isa: str, part: int) -> None:
    drawn = cases(90, 61, ops=("attention", "varlen", "decode"), sizes=(1, 3, 8, 17, 33, 63, 64, 65))
    with native.use_isa(isa):
        assert native.isa == isa
        for case in drawn[part::3]:
            assert_case(case, "cpu")


@loaded
def test_portable_runs_everywhere() -> None:
    assert "portable" in native.usable()


@loaded
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_computes_the_same() -> None:
    """As with PyTorch's own functions, the child has to stay on one thread."""
    code = (
        "import os, sys, torch, attn\n"
        "q, k, v = torch.randn(3, 2, 4, 70, 16)\n"
        "torch.set_num_threads(2)\n"
        "expected = attn.attention(q, k, v, backend='cpu')\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    torch.set_num_threads(1)\n"
        "    os._exit(0 if torch.equal(attn.attention(q, k, v, backend='cpu'), expected) else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(attn.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def operands() -> Operands:
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    return Operands(q, k, v)


WRONG = [
    ({"key_lengths": int32(5, 6)}, r"key_lengths\[1\] is 6; it must be in \[0, 5\]"),
    ({"key_lengths": int32(-1, 5)}, r"key_lengths\[0\] is -1"),
    ({"query_lengths": int32(5, 9)}, r"query_lengths\[1\] is 9"),
    ({"prefix": int32(0, -7)}, r"prefix\[1\] is -7"),
    ({"key_lengths": int32(1, 2, 3)}, r"key_lengths must have shape \(2\)"),
    ({"key_lengths": torch.tensor([1, 2])}, "key_lengths has a dtype"),
    ({"ids_q": torch.zeros(2, 5, dtype=torch.int64)}, "ids_q and ids_k must be given together"),
    ({"keep": torch.ones(2, 4, 5, 6, dtype=torch.bool)}, "keep must broadcast"),
    ({"keep": torch.ones(1, 1, 5, 5)}, "keep must be bool"),
    ({"bias": torch.ones(5, 5)}, "bias must have 4 dims"),
    ({"bias": torch.ones(1, 1, 5, 5, dtype=torch.int64)}, "bias must be float32"),
    ({"alibi_slopes": torch.ones(4)}, r"alibi_slopes must have shape \(2, 4\)"),
    ({"dropout_p": 0.5, "key_lengths": int32(5, 5)}, "rng must be given"),
    ({"k": torch.randn(2, 3, 5, 8)}, "k and v must agree|multiple"),
    ({"k": torch.randn(2, 4, 5, 9)}, "share a head_dim"),
    ({"v": torch.randn(2, 4, 5, 8).double()}, "v must have the dtype of q"),
    ({"q": torch.randn(2, 4, 5)}, "q must have 4 dims"),
]


@loaded
@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[m for _, m in WRONG])
def test_the_ops_check_what_they_are_given(operands: Operands, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("cpu").forward(operands._replace(**changes))  # type: ignore[arg-type]


@loaded
@pytest.mark.parametrize(
    ("cu", "message"),
    [
        (int32(1, 5), r"cu_seqlens_q\[0\] is 1; it must be 0"),
        (int32(0, 4, 3), r"cu_seqlens_q\[2\] is 3; it must be >= 4"),
        (int32(0, 11), r"cu_seqlens_q\[1\] is 11; there are only 10 tokens"),
    ],
)
def test_packed_bounds_are_checked(cu: Tensor, message: str) -> None:
    q = torch.randn(1, 4, 10, 8)
    fine = torch.linspace(0, 10, cu.numel()).to(torch.int32)
    with pytest.raises(ValueError, match=message):
        load("cpu").forward(Operands(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=fine))


@loaded
@pytest.mark.parametrize("dense", [{"bias": torch.zeros(1, 1, 10, 10)}, {"keep": torch.ones(1, 1, 1, 10) > 0}])
def test_packed_calls_take_no_dense_parts(dense: dict[str, Tensor]) -> None:
    q, cu = torch.randn(1, 4, 10, 8), int32(0, 4, 10)
    with pytest.raises(ValueError, match="a packed call takes no bias, keep or documents"):
        load("cpu").forward(Operands(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu, **dense))


@loaded
@pytest.mark.parametrize(
    ("lengths", "table", "message"),
    [
        (int32(9), None, r"lengths\[0\] is 9; it must be in \[0, 8\]"),
        (int32(17), int32(0, 1)[None], r"lengths\[0\] is 17; it must be in \[0, 16\]"),
        (int32(9), int32(0, 3)[None], r"block_table\[0, 1\] is 3; it must be in \[0, 2\]"),
        (int32(9), int32(-1, 0)[None], r"block_table\[0, 0\] is -1"),
    ],
)
def test_pages_are_checked(lengths: Tensor, table: Tensor | None, message: str) -> None:
    q, cache = torch.randn(1, 4, 1, 8), torch.randn(3 if table is not None else 1, 4, 8, 8)
    with pytest.raises(ValueError, match=message):
        load("cpu").decode(DecodeOperands(q, cache, cache, lengths, table))


@loaded
def test_packed_tokens_of_no_sequence_are_dead() -> None:
    q = torch.randn(1, 4, 70, 8)
    nothing = Operands(q, q, q, alibi_slopes=torch.ones(0, 4), cu_seqlens_q=int32(0), cu_seqlens_k=int32(0))
    out, m, l = load("cpu").forward(nothing)
    assert not out.any()
    assert not l.any()
    assert bool((m == -torch.inf).all())
    assert not any(bool(t.any()) for t in load("cpu").backward(nothing, (out, m, l), q, None, None, False)[:3])


@loaded
def test_pages_out_of_use_may_hold_anything() -> None:
    q, cache = torch.randn(1, 4, 1, 8), torch.randn(3, 4, 8, 8)
    out, _ = load("cpu").decode(DecodeOperands(q, cache, cache, int32(8), int32(2, 1 << 30)[None]))
    assert bool(out.isfinite().all())


@loaded
def test_a_compiled_call_is_checked_too() -> None:
    """torch.compile leaves out what the public functions check by looking at values."""
    q = torch.randn(2, 4, 5, 8)

    @torch.compile(backend="eager", fullgraph=True)
    def run(lengths: Tensor) -> Tensor:
        out = attn.attention(q, q, q, mask=attn.masks.padding(lengths), backend="cpu")
        assert isinstance(out, Tensor)
        return out

    assert torch.equal(run(int32(5, 3)), attn.attention(q, q, q, mask=attn.masks.padding(int32(5, 3)), backend="cpu"))
    with pytest.raises(ValueError, match=r"key_lengths\[1\] is 1000"):
        run(int32(5, 1000))


@loaded
def test_a_library_of_another_version_is_not_called() -> None:
    """Sources were updated and not built: Python passes arguments that the library does not know."""
    code = (
        "import pathlib, sys, types, torch, attn\n"
        "path = pathlib.Path(attn.__path__[0], 'native.py')\n"
        "old, new = 'infer({_PLAIN}) -> Tensor', 'infer({_PLAIN}, int more) -> Tensor'\n"
        "text = path.read_text()\n"
        "assert old in text\n"
        "native = types.ModuleType('attn.native')\n"
        "native.__file__ = str(path)\n"
        "sys.modules['attn.native'] = native\n"
        "exec(text.replace(old, new), native.__dict__)\n"
        "assert native.load() is None\n"
        "native.infer(*torch.randn(3, 1, 1, 2, 8), -1, -1, False, 1.0, 0.0, 7)\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(attn.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ValueError: attn_cpu: the library is not that of these Python files" in done.stderr


@loaded
def test_wrong_instruction_sets_are_named() -> None:
    with pytest.raises(ValueError, match=r"'mmx' cannot run here; usable: .*portable"), native.use_isa("mmx"):
        pass
    code = "from attn import native; print(native.load())"
    env = os.environ | {"PYTHONPATH": str(Path(attn.__file__).parent.parent), "ATTN_CPU_ISA": "mmx"}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert "ATTN_CPU_ISA is 'mmx'" in said
    assert "portable" in said


@loaded
def test_the_instruction_set_is_forced_by_the_environment() -> None:
    code = "from attn import native; print(native.load(), native.isa)"
    env = os.environ | {"PYTHONPATH": str(Path(attn.__file__).parent.parent), "ATTN_CPU_ISA": "portable"}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["None", "portable"]


@loaded
@pytest.mark.skipif("amx" not in native.usable(), reason="Linux grants no tiles here, or there are none")
@pytest.mark.parametrize(("isa", "asks"), [("amx", True), ("avx512", False), ("portable", False)])
def test_tiles_are_asked_for_by_those_who_want_them(isa: str, asks: bool) -> None:
    """For good: from then on the whole process needs larger stacks for signals."""
    code = (
        "import ctypes, torch\n"
        "def granted():\n"
        "    found = ctypes.c_uint64()\n"
        "    assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(found)) == 0  # ARCH_GET_XCOMP_PERM\n"
        "    return found.value >> 18 & 1\n"
        "from attn import native\n"
        "before = granted()\n"
        "print(native.load(), before, granted())\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(attn.__file__).parent.parent), "ATTN_CPU_ISA": isa}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["None", "0", str(int(asks))]


@loaded
def test_outputs_start_poisoned_where_asked(operands: Operands) -> None:
    native.poison(True)
    try:
        dead = load("cpu").forward(operands._replace(key_lengths=int32(0, 5)))
    finally:
        native.poison(False)
    assert not any(bool(t.isnan().any()) for t in dead)


@loaded
def test_lazy_negation_and_lazy_zeros_are_resolved() -> None:
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    expected = attn.attention(q, k, v, bias=q[..., :5] * 3, backend="cpu")
    lazy = torch._neg_view(-q[..., :5] * 3)
    assert lazy.is_neg()
    assert same_bits(attn.attention(q, k, v, bias=lazy, backend="cpu"), expected)
    assert same_bits(attn.attention(torch._neg_view(-q), k, v, bias=lazy, backend="cpu"), expected)
    q.requires_grad_()
    out = attn.attention(q, k, v, backend="cpu")
    (gradient,) = torch.autograd.grad(out, q, torch._efficientzerotensor(out.shape))
    assert not gradient.any()


@loaded
def test_tensors_without_memory_of_their_own_are_not_read() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    q, k, v = torch.randn(3, 2, 4, 5, 8)
    wrapped = attn.attention(q, TwoTensor(k, k), v, backend="cpu")
    assert isinstance(wrapped, TwoTensor)
    assert same_bits(wrapped.a, attn.attention(q, k, v, backend="cpu"))
    k.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="its storage was freed"):
        attn.attention(q, k, v, backend="cpu")


@loaded
def test_schemas_tell_the_truth(operands: Operands) -> None:
    x = operands._replace(key_lengths=int32(5, 3))
    out, m, l = load("cpu").forward(x)
    ops = torch.ops.attn_cpu
    for op, args in (
        (ops.forward, (*x, 1, True)),
        (ops.weights, (m, l, *x, True)),
        (ops.backward, (out, None, None, out, m, l, *x._replace(bias=torch.zeros(1, 1, 5, 5)), True)),
        (ops.decode, (x.q, x.k, x.v, int32(5, 3), None, None, -1, 0, 1.0, 0.0)),
        (ops.plain, (*x[:3], -1, 0, False, 1.0, 0.0, 2)),
        (ops.infer, (*x[:3], -1, 0, False, 1.0, 0.0)),
        (ops.infer_weights, (*x[:3], -1, 0, False, 1.0, 0.0, 1)),
    ):
        torch.library.opcheck(op.default, args, test_utils="test_schema")


@loaded
def test_a_call_costs_less_than_pytorchs_own() -> None:
    """One interleaved run; at this size all is overhead."""
    from timeit import timeit

    q, k, v = torch.randn(8, 16, 3 * 64).view(8, 16, 12, 16).transpose(1, 2).chunk(3, 1)
    x, engine = Operands(q, k, v, scale=0.25), load("cpu")
    ratios = []
    with torch.no_grad():
        for _ in range(15):
            ours = timeit(lambda: engine.infer(x, ""), number=100)
            theirs = timeit(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), number=100)
            ratios.append(theirs / ours)
    assert sorted(ratios)[7] > 1, ratios


@loaded
def test_the_planner_takes_it_where_it_is_the_faster_one() -> None:
    if "avx2" not in native.usable():
        pytest.skip("no instruction set whose speed has been measured")
    plain = AttentionSpec(head_dim=64, value_dim=64)
    served = {}
    for isa in ("avx2", "portable"):
        planner.forget()
        with native.use_isa(isa):
            served[isa] = [planner.choose(plain._replace(**c)).name for c in ({}, {"softcap": True}, {"grad": True})]
            double = planner.explain_spec(plain._replace(dtype=torch.float64))
            assert double.chosen == "sdpa"
            assert "slower than PyTorch's own in float64 inference" in str(double.reasons["cpu"])
    planner.forget()
    assert served == {"avx2": ["cpu", "cpu", "cpu"], "portable": ["sdpa", "cpu", "sdpa"]}


def test_without_the_library_everything_else_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load("cpu"), "missing", "its library is not here")
    planner.forget()
    try:
        q = torch.randn(1, 2, 3, 4)
        assert attn.explain(q, q, q).chosen == "sdpa"
        with pytest.raises(RuntimeError, match="its library is not here"):
            attn.attention(q, q, q, backend="cpu")
    finally:
        monkeypatch.undo()
        planner.forget()
