"""Spec lines: what is printed is read back, and what is wrong is named."""

from __future__ import annotations

import itertools

import pytest
import torch

from attn.spec import AttentionSpec, DecodeOperands, Operands, arch_of

FLAGS = [n for n, d in AttentionSpec._field_defaults.items() if isinstance(d, bool)]


def test_default_prints_short() -> None:
    assert str(AttentionSpec(head_dim=64, value_dim=64)) == "attention cpu float32 head_dim=64 value_dim=64"


@pytest.mark.parametrize("op", ["attention", "varlen", "decode"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_trip_of_op_and_dtype(op: str, dtype: torch.dtype) -> None:
    spec = AttentionSpec(op, "cuda", dtype, "sm_90", 100, 40, band="end", weights="mean", scale_positive=False)
    assert AttentionSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(FLAGS, 2)))
def test_round_trip_of_every_pair_of_flags(a: str, b: str) -> None:
    flipped = {n: not AttentionSpec._field_defaults[n] for n in (a, b)}
    spec = AttentionSpec(head_dim=8, **flipped)  # type: ignore[arg-type]
    read = AttentionSpec.parse(str(spec))
    assert read == spec
    assert all(type(x) is type(y) for x, y in zip(read, spec, strict=True))
    assert hash(read) == hash(spec)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "too short"),
        ("attention cpu", "too short"),
        ("attention cpu float31 head_dim=8", "'float31' is no dtype"),
        ("attention cpu Tensor head_dim=8", "'Tensor' is no dtype"),
        ("attention cpu float32 head_dims=8", "unknown field 'head_dims=8'"),
        ("attention cpu float32 head_dim=many", "'head_dim=many' needs a number"),
        ("attention cpu float32 head_dim", "'head_dim' needs a number"),
        ("attention cpu float32 causal=maybe", "'causal=maybe' needs a number"),
    ],
)
def test_wrong_lines(line: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AttentionSpec.parse(line)


def test_false_is_printed_where_true_is_the_default() -> None:
    assert "scale_positive=0" in str(AttentionSpec(scale_positive=False))


def test_has_band() -> None:
    t = torch.zeros(1, 1, 1, 1)
    assert not Operands(t, t, t).has_band
    assert Operands(t, t, t, left=0).has_band
    assert Operands(t, t, t, right=0).has_band


def test_every_tensor_comes_before_every_number() -> None:
    """The ops pass operands on by position: tensors up to rng, then numbers."""
    t = torch.zeros(1, 1, 1, 1)
    numbers = [isinstance(v, (int, float)) for v in Operands(t, t, t)]
    assert numbers == sorted(numbers)
    numbers = [isinstance(v, (int, float)) for v in DecodeOperands(t, t, t, t)]
    assert numbers == sorted(numbers)


def test_no_architecture_off_the_gpu() -> None:
    assert arch_of("cpu", None) == ""
