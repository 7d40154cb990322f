"""Every feature of the Triton kernels, forward and backward, against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attn.backends import load
from attn.testing import Case, assert_case, assert_gradients, cases, oracle
from attn.testing.matrix import DTYPES, SITUATIONS, situation
from attn.triton_kernels import arguments, config
from attn.triton_kernels.launch import observed


@pytest.mark.parametrize("name", SITUATIONS)
def test_situation(name: str) -> None:
    dtype = DTYPES[list(SITUATIONS).index(name) % 3]
    assert_case(situation(name, dtype), "triton")


@pytest.mark.slow
@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.parametrize("name", SITUATIONS)
def test_situation_in_the_other_dtypes(name: str, turn: int) -> None:
    dtype = DTYPES[(list(SITUATIONS).index(name) + turn) % 3]
    assert_case(situation(name, dtype, seed=12 + turn), "triton")


BROADCASTS = ("bhij", "hij", "bij", "ij", "j", "hi", "b", "", "hj", "bh")


@pytest.mark.parametrize("kept", BROADCASTS)
def test_gradient_of_a_broadcast_bias(kept: str) -> None:
    """The sum over the broadcast dims is that of the gradient of the full bias, and itself in a fixed order."""
    case = situation("bias", torch.float32, L=33, S=35)
    x = case.operands()
    full = (2, 2, 33, 35)
    shape = tuple(n if c in kept else 1 for n, c in zip(full, "bhij", strict=True))
    x = x._replace(bias=torch.randn(shape))
    d_out, d_lse, _ = case.gradients(x)
    engine = load("triton")
    forward = engine.forward(x)
    first = engine.backward(x, forward, d_out, d_lse, None, True)
    again = engine.backward(x, forward, d_out, d_lse, None, True)
    assert first[3] is not None
    assert first[3].shape == shape
    assert torch.equal(first[3], again[3])
    assert_gradients(oracle(x, (d_out, d_lse, None)), *first)


SMALL = {"sizes": (2, 3, 31, 32, 33, 40), "head_dims": (1, 8, 17, 40)}


def small(n: int, seed: int, op: str) -> list[Case]:
    """Random cases whose heads are few: the interpreter's time goes by tiles."""
    made = []
    for case in cases(n, seed, ops=(op,), **SMALL):
        group = case.Hq // case.Hkv
        made.append(dataclasses.replace(case, Hq=group, Hkv=1, B=min(case.B, 2)))
    return made


@pytest.mark.parametrize("case", small(14, 5, "attention"), ids=str)
def test_random_call(case: Case) -> None:
    assert_case(case, "triton")


@pytest.mark.parametrize("case", cases(24, 6, ops=("decode",)), ids=str)
def test_random_decoding_step(case: Case) -> None:
    assert_case(case, "triton")


@pytest.mark.parametrize("case", small(6, 7, "varlen"), ids=str)
def test_random_packed_call(case: Case) -> None:
    assert_case(case, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("case", small(70, 8, "attention") + small(30, 9, "varlen"), ids=str)
def test_more_random_calls(case: Case) -> None:
    assert_case(case, "triton")


@pytest.mark.parametrize("name", ["causal", "lengths", "bias_finfo_min", "varlen_causal", "softcap"])
def test_single_pass_backward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """dQ by atomics in the kernel that makes dK and dV: opt-in, and never where determinism is asked for."""
    monkeypatch.setattr(config, "one_pass", lambda *_: True)
    arguments.plans.clear()
    with observed() as entries:
        assert_case(situation(name, torch.float32), "triton")
    parts = {entry.constants.get("PART") for entry in entries}
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    arguments.plans.clear()
    with observed() as entries:
        assert_case(situation(name, torch.float32), "triton")
    arguments.plans.clear()
    assert "one_pass" in parts
    assert "one_pass" not in {entry.constants.get("PART") for entry in entries}


@pytest.mark.parametrize("name", ["full", "lengths", "prefix_window", "varlen_causal"])
def test_tensor_descriptors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Hopper and Blackwell load by: the same numbers as by pointers."""
    monkeypatch.setattr(config, "descriptors", lambda arch: True)
    arguments.plans.clear()
    with observed() as entries:
        assert_case(situation(name, torch.bfloat16, head_dim=16, value_dim=32), "triton")
    arguments.plans.clear()
    assert any(entry.constants["F"].TMA for entry in entries)


def test_blocks_outside_the_mask_are_not_loaded() -> None:
    """A NaN in a value that no visited block holds stays there: 0 * NaN would show that the block was loaded."""
    x = situation("full", torch.float32, B=1, L=96, S=96, head_dim=16, value_dim=16).operands()
    v = x.v.clone()
    v[:, :, 64:] = torch.nan
    for call in (
        x._replace(v=v, q=x.q[:, :, :64], right=0),
        x._replace(v=v, left=0, right=0, q=x.q[:, :, :64]),
        x._replace(v=v, key_lengths=torch.tensor([64], dtype=torch.int32)),
        x._replace(v=v, ids_q=torch.zeros(1, 96, dtype=torch.int64), ids_k=(torch.arange(96) >= 64).long()[None]),
    ):
        assert bool(load("triton").forward(call)[0].isfinite().all())
    v = x.v.clone()
    v[:, :, 32:64] = torch.nan  # for the last rows between the prefix and the window
    last = x._replace(v=v, left=4, right=0, end=True, q=x.q[:, :, 68:])
    gap = last._replace(prefix=torch.tensor([20], dtype=torch.int32))
    assert bool(load("triton").forward(gap)[0].isfinite().all())
