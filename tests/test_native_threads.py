"""The compiled library on any number of threads: the same bits, however many tiles of queries a unit of work has."""

from __future__ import annotations

import pytest
import torch
from same_bits import same_bits

import attn
from attn import native
from attn.backends import load
from attn.operands import checked
from attn.spec import Operands
from attn.testing import assert_case, assert_forward, cases, oracle, run_case

pytestmark = [
    pytest.mark.skipif(native.load() is not None, reason=str(native.load())),
    pytest.mark.usefixtures("threads"),
]
each_isa = pytest.mark.parametrize("isa", native.usable())


@each_isa
def test_tiles_of_queries_that_go_over_the_keys_together(isa: str) -> None:
    """Long calls, in which a unit of work is several tiles: how many depends on the threads, and no bit on that."""
    before = torch.get_num_threads()
    with native.use_isa(isa):
        for case in cases(6, 73, ops=("attention", "varlen"), sizes=(200, 330)):
            assert_case(case, "cpu")
            many = run_case(case, "cpu").out
            torch.set_num_threads(9)
            assert same_bits(many, run_case(case, "cpu").out), str(case)
            torch.set_num_threads(before)


@each_isa
def test_tiles_of_queries_that_go_over_a_dense_mask_together(isa: str) -> None:
    """Some see nothing of a tile of keys, some all of it, some a part; the last row sees nothing at all."""
    torch.manual_seed(79)
    q, k, v = (torch.randn(1, 4, 600, 16) for _ in range(3))
    visible = torch.rand(600, 600) > 0.5
    visible[64:200, 128:256] = False
    visible[300:520, 64:400] = True
    visible[-1] = False
    results = []
    with native.use_isa(isa):
        for n in (1, 9):  # five tiles together, and each by itself
            torch.set_num_threads(n)
            results.append(attn.attention(q, k, v, mask=attn.masks.dense(visible), backend="cpu"))
    assert same_bits(*results)
    assert_forward(oracle(checked(q, k, v, attn.masks.dense(visible))), results[0], gate=True)


@each_isa
def test_infinite_values_that_some_tiles_see(isa: str) -> None:
    """The same bits for tiles together and each by itself: a value past the keys of a tile of queries takes no part."""
    torch.manual_seed(80)
    q, k, v = (torch.randn(1, 8, n, 64).bfloat16() for n in (128, 133, 133))
    v[:, :, 80] = torch.inf
    x = Operands(q, k, v, right=0, end=True, scale=0.125)
    results = []
    with native.use_isa(isa):
        for n in (1, 9):
            torch.set_num_threads(n)
            results.append(load("cpu").forward(x)[0])
    assert same_bits(*results)
    assert results[0][:, :, :64].isfinite().all()
    assert not results[0][:, :, 75:].isfinite().any()


def test_every_result_is_the_same_on_any_number_of_threads() -> None:
    drawn = [c for c in cases(40, 67, ops=("attention", "varlen", "decode"), sizes=(3, 17, 65, 130)) if c.has_gradients]
    drawn += cases(10, 71, ops=("decode",), sizes=(17, 300))
    for case in drawn:
        results = []
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(run_case(case, "cpu"))
        for name in ("out", "m", "l", "lse", "weights", "dq", "dk", "dv", "d_bias"):
            first, *others = (getattr(r, name) for r in results)
            for other in others:
                assert (first is None) == (other is None)
                assert first is None or same_bits(first, other), (name, str(case))
