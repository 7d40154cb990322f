"""Bad input: PyTorch's exception types, a message that names the argument, and nothing changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import attn

E, H, N, L, S = 16, 4, 2, 3, 5


def good(**changes: Any) -> dict[str, Any]:
    x, y = torch.randn(N, L, E), torch.randn(N, S, E)
    return {"query": x, "key": y, "value": y} | changes


def bools(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bool)


CASES = {
    "query 1-D": (good(query=torch.randn(E)), AssertionError, "query should be unbatched 2D or batched 3D"),
    "query 4-D": (good(query=torch.randn(1, N, L, E)), AssertionError, "4-D query"),
    "key 2-D": (good(key=torch.randn(S, E)), AssertionError, "key and value"),
    "value 2-D": (good(value=torch.randn(S, E)), AssertionError, "key and value"),
    "query features": (good(query=torch.randn(N, L, 8)), AssertionError, "dimension of 16, but got 8"),
    "key features": (good(key=torch.randn(N, S, 8), value=torch.randn(N, S, 8)), RuntimeError, "key has 8 features"),
    "value length": (good(value=torch.randn(N, 4, E)), AssertionError, "key shape .* does not match value shape"),
    "key batch": (good(key=torch.randn(4, S, E), value=torch.randn(4, S, E)), RuntimeError, "key has batch size 4"),
    "key dtype": (good(key=torch.randn(N, S, E).double()), RuntimeError, "key is torch.float64"),
    "query dtype": (good(query=torch.randn(N, L, E).double()), RuntimeError, "query is torch.float64"),
    "query device": (good(query=torch.empty(N, L, E, device="meta")), RuntimeError, "query is on meta"),
    "mask device": (good(attn_mask=torch.empty(L, S, device="meta")), RuntimeError, "attn_mask is on meta"),
    "mask 1-D": (good(attn_mask=bools(S)), AssertionError, "attn_mask must be 2-D or 3-D"),
    "mask 4-D": (good(attn_mask=bools(N, H, L, S)), AssertionError, "attn_mask must be 2-D or 3-D"),
    "mask shape": (good(attn_mask=bools(1, S)), RuntimeError, r"2D attn_mask is \(1, 5\), but should be \(3, 5\)"),
    "mask shape 3-D": (good(attn_mask=bools(N, L, S)), RuntimeError, "3D attn_mask"),
    "mask one": (good(attn_mask=bools(1, L, S)), RuntimeError, "3D attn_mask"),
    "mask uint8": (good(attn_mask=bools(L, S).to(torch.uint8)), AssertionError, "types of attn_mask"),
    "mask int64": (good(attn_mask=bools(L, S).long()), AssertionError, "types of attn_mask"),
    "mask float64": (good(attn_mask=torch.zeros(L, S).double()), RuntimeError, "attn_mask .*float64"),
    "mask bfloat16": (good(attn_mask=torch.zeros(L, S).bfloat16()), RuntimeError, "attn_mask .*bfloat16"),
    "padding 1-D": (good(key_padding_mask=bools(S)), AssertionError, "key_padding_mask must be 2-D"),
    "padding transposed": (good(key_padding_mask=bools(S, N)), AssertionError, "key_padding_mask has shape"),
    "padding long": (good(key_padding_mask=bools(N, S + 1)), AssertionError, "key_padding_mask has shape"),
    "padding int64": (good(key_padding_mask=bools(N, S).long()), AssertionError, "types of key_padding_mask"),
    "padding float64": (good(key_padding_mask=torch.zeros(N, S).double()), RuntimeError, "key_padding_mask"),
    "hint alone": (good(is_causal=True), RuntimeError, "Need attn_mask"),
    "hint with padding": (good(is_causal=True, key_padding_mask=bools(N, S)), RuntimeError, "Need attn_mask"),
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_bad_calls(name: str, need_weights: bool) -> None:
    arguments, kind, words = CASES[name]
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(E, H, batch_first=True)
    ours = attn.MultiheadAttention(E, H, batch_first=True, dropout=0.5)
    before = copy.deepcopy(ours.state_dict())
    random = torch.get_rng_state()
    with pytest.raises(kind, match=words):
        ours(**arguments, need_weights=need_weights)
    assert all(torch.equal(t, before[n]) for n, t in ours.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    if "device" not in name:  # on the meta device PyTorch's matrix product says nothing
        with pytest.raises(kind):
            stock(**arguments, need_weights=need_weights)


UNBATCHED = {
    "padding 2-D": ({"key_padding_mask": bools(1, L)}, AssertionError, "key_padding_mask must be 1-D"),
    "padding long": ({"key_padding_mask": bools(L + 1)}, AssertionError, "key_padding_mask has shape"),
    "mask 3-D": ({"attn_mask": bools(1, L, L)}, AssertionError, "attn_mask"),
    "mask shape": ({"attn_mask": bools(L, L + 1)}, RuntimeError, "2D attn_mask"),
    "key 3-D": ({"key": torch.randn(1, L, E)}, AssertionError, "key and value"),
}


@pytest.mark.parametrize("name", UNBATCHED)
def test_bad_unbatched_calls(name: str) -> None:
    changes, kind, words = UNBATCHED[name]
    x = torch.randn(L, E)
    arguments = {"query": x, "key": x, "value": x} | changes
    with pytest.raises(kind, match=words):
        attn.MultiheadAttention(E, H)(**arguments)
    with pytest.raises(kind):
        nn.MultiheadAttention(E, H)(**arguments)


def test_separate_projections_check_their_features() -> None:
    x = torch.randn(N, L, E)
    for kind in (attn.MultiheadAttention, nn.MultiheadAttention):
        m = kind(E, H, kdim=6, vdim=10, batch_first=True)
        with pytest.raises(AssertionError):
            m(x, torch.randn(N, S, 7), torch.randn(N, S, 10))
        with pytest.raises(AssertionError):
            m(x, torch.randn(N, S, 6), torch.randn(N, 4, 10))


@pytest.mark.parametrize("wrong", [None, [1.0], 3])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_what_is_no_tensor(name: str, wrong: object) -> None:
    with pytest.raises(TypeError, match=f"{name} is {type(wrong).__name__}"):
        attn.MultiheadAttention(E, H, batch_first=True)(**good(**{name: wrong}))


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_masks_that_are_no_tensors(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} is list"):
        attn.MultiheadAttention(E, H, batch_first=True)(**good(**{name: [True]}))


def test_fast_path_silence_is_no_model() -> None:
    """PyTorch's eval fast path ignores the hint without a mask; ours raises there too."""
    x = torch.randn(N, L, E)
    stock = nn.MultiheadAttention(E, H, batch_first=True).eval()
    ours = attn.MultiheadAttention(E, H, batch_first=True).eval()
    with torch.no_grad():
        assert stock(x, x, x, is_causal=True)[0].shape == x.shape
        with pytest.raises(RuntimeError, match="Need attn_mask"):
            ours(x, x, x, is_causal=True)


def test_forced_backend_that_cannot_run_the_call_raises() -> None:
    m = attn.MultiheadAttention(E, H, batch_first=True, backend="sdpa")
    with pytest.raises(RuntimeError, match=r"'sdpa' was asked for and cannot run this call.*weights"):
        m(**good())
    assert m(**good(), need_weights=False)[1] is None
    with attn.use_backend("reference"):  # goes before the module's own
        assert m(**good())[1] is not None


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_input_that_cannot_be_taken() -> None:
    parts = [torch.randn(3, E), torch.randn(5, E)]
    strided, jagged = (torch.nested.nested_tensor(parts, layout=k) for k in (torch.strided, torch.jagged))
    m = attn.MultiheadAttention(E, H, batch_first=True)
    with pytest.raises(AssertionError, match=r"layout torch\.jagged"):
        m(jagged, jagged, jagged)
    with pytest.raises(AssertionError, match="self-attention only"):
        m(strided, torch.randn(2, 5, E), torch.randn(2, 5, E))
    with pytest.raises(AssertionError, match="no attn_mask and no key_padding_mask"):
        m(strided, strided, strided, key_padding_mask=bools(2, 5))
    with pytest.raises(AssertionError, match="batch_first=True"):
        attn.MultiheadAttention(E, H)(strided, strided, strided)
    with pytest.raises(AssertionError, match="add_bias_kv"):
        attn.MultiheadAttention(E, H, batch_first=True, add_bias_kv=True)(strided, strided, strided)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", [nn.MultiheadAttention, attn.MultiheadAttention])
def test_float32_masks_beside_other_dtypes(dtype: torch.dtype, kind: type[nn.MultiheadAttention]) -> None:
    """Without weights a float32 mask is taken whatever the query is; with weights it is refused."""
    m = kind(E, H, batch_first=True, dtype=dtype)
    x = torch.randn(N, L, E, dtype=dtype)
    for masks in ({"attn_mask": torch.randn(L, L)}, {"key_padding_mask": torch.randn(N, L)}):
        assert m(x, x, x, need_weights=False, **masks)[0].dtype == dtype
        with pytest.raises(RuntimeError):
            m(x, x, x, need_weights=True, **masks)
