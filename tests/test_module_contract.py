"""What `nn.MultiheadAttention` promises, held for ours: construction, state, shapes, outputs, errors."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attn
from attn.testing import assert_close, assert_module_close

E, H, N, L, S = 16, 4, 3, 5, 7
CTORS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"bias": False, "add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 6, "vdim": 10},
    {"kdim": E, "vdim": E},
    {"kdim": 6, "add_bias_kv": True, "bias": False},
    {"batch_first": True, "dropout": 0.3, "dtype": torch.float64},
]


def pair(**ctor: Any) -> tuple[nn.MultiheadAttention, attn.MultiheadAttention]:
    """PyTorch's module and ours with the same parameters."""
    torch.manual_seed(1)
    stock = nn.MultiheadAttention(E, H, **ctor)
    with torch.no_grad():
        for p in stock.parameters():
            p.normal_(std=0.4)
    ours = attn.MultiheadAttention(E, H, **ctor)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


# --- construction -----------------------------------------------------------------------------------------


def test_signature_starts_with_pytorchs() -> None:
    theirs = list(inspect.signature(nn.MultiheadAttention.__init__).parameters.values())
    mine = list(inspect.signature(attn.MultiheadAttention.__init__).parameters.values())
    assert [(p.name, p.default) for p in mine[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in mine[len(theirs) :])
    theirs = list(inspect.signature(nn.MultiheadAttention.forward).parameters.values())
    mine = list(inspect.signature(attn.MultiheadAttention.forward).parameters.values())
    assert [(p.name, p.default) for p in mine] == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize("ctor", CTORS, ids=str)
def test_parameters_and_random_numbers_at_init(ctor: dict[str, Any]) -> None:
    torch.manual_seed(3)
    stock = nn.MultiheadAttention(E, H, **ctor)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    ours = attn.MultiheadAttention(E, H, **ctor)
    assert torch.equal(torch.get_rng_state(), after)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in stock.named_parameters()]
    assert ours._parameters.keys() == stock._parameters.keys()
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    ours._reset_parameters()
    assert not torch.equal(next(ours.parameters()), next(stock.parameters()))


@pytest.mark.parametrize("ctor", CTORS, ids=str)
def test_attributes_and_repr(ctor: dict[str, Any]) -> None:
    stock, ours = pair(**ctor)
    names = ["embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn"]
    assert ours._qkv_same_embed_dim == stock._qkv_same_embed_dim
    assert [getattr(ours, n) for n in names] == [getattr(stock, n) for n in names]
    assert repr(ours) == repr(stock)
    assert (ours.bias_k is None) == (stock.bias_k is None)
    assert isinstance(ours, nn.MultiheadAttention)
    assert ours.__constants__ == stock.__constants__


@pytest.mark.parametrize("ctor", CTORS, ids=str)
def test_state_dict_both_ways(ctor: dict[str, Any]) -> None:
    stock, ours = pair(**ctor)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert ours.state_dict()._metadata == stock.state_dict()._metadata
    stock.load_state_dict(attn.MultiheadAttention(E, H, **ctor).state_dict())
    with pytest.raises(RuntimeError, match="q_proj_weight"):
        attn.MultiheadAttention(E, H, kdim=3).load_state_dict(pair()[0].state_dict())


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"embed_dim": 0, "num_heads": 2}, ValueError, "embed_dim and num_heads must be greater than 0"),
        ({"embed_dim": 8, "num_heads": -1}, ValueError, "num_heads=-1"),
        ({"embed_dim": 10, "num_heads": 4}, AssertionError, "embed_dim must be divisible by num_heads"),
        ({"embed_dim": 8.0, "num_heads": 2}, TypeError, None),
        ({"embed_dim": 16, "num_heads": 4, "num_kv_heads": 3}, ValueError, "num_kv_heads is 3"),
        ({"embed_dim": 16, "num_heads": 4, "num_kv_heads": 2.0}, TypeError, "num_kv_heads"),
        ({"embed_dim": 16, "num_heads": 4, "window": 3}, TypeError, "window is 3"),
        ({"embed_dim": 16, "num_heads": 4, "window": (-1, 0)}, ValueError, "left is -1"),
        ({"embed_dim": 16, "num_heads": 4, "rotary": 4}, TypeError, "rotary is int"),
        ({"embed_dim": 16, "num_heads": 4, "rotary": attn.Rotary(6)}, ValueError, "rotary.dim is 6"),
        ({"embed_dim": 16, "num_heads": 4, "backend": "magic"}, ValueError, "magic"),
        ({"embed_dim": 16, "num_heads": 4, "masked_rows": "one"}, ValueError, "masked_rows is 'one'"),
    ],
)
def test_constructor_errors(arguments: dict[str, Any], kind: type[Exception], words: str | None) -> None:
    with pytest.raises(kind, match=words):
        attn.MultiheadAttention(**arguments)


@pytest.mark.parametrize("ctor", [{"num_heads": 2.0}, {"num_heads": True}, {"num_heads": 2, "kdim": 0}])
def test_constructor_is_as_permissive(ctor: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # initialising a tensor without elements
        assert attn.MultiheadAttention(8, **ctor).embed_dim == 8


def test_meta_device_skip_init_and_to_empty() -> None:
    m = attn.MultiheadAttention(E, H, device="meta", batch_first=True)
    x = torch.empty(N, L, E, device="meta")
    out, weights = m(x, x, x)
    assert out.shape == (N, L, E)
    assert weights.shape == (N, L, L)
    assert out.device.type == weights.device.type == "meta"
    assert m(x, x, x, key_padding_mask=torch.empty(N, L, dtype=torch.bool, device="meta"))[0].is_meta
    assert m.to_empty(device="cpu").in_proj_weight.device.type == "cpu"
    assert nn.utils.skip_init(attn.MultiheadAttention, E, H).in_proj_weight.shape == (3 * E, E)


def test_setstate_of_old_checkpoints() -> None:
    _, ours = pair()
    state = ours.__dict__.copy()
    del state["_qkv_same_embed_dim"]
    for name in ("window", "rotary", "backend", "masked_rows"):
        state.pop(name, None)
    old = attn.MultiheadAttention.__new__(attn.MultiheadAttention)
    old.__setstate__(state)
    x = inputs(L, N, E)
    assert torch.equal(old(x, x, x)[0], ours(x, x, x)[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_apart(copied: Callable[[nn.Module], Any]) -> None:
    _, ours = pair(batch_first=True)
    x = inputs(N, L, E)
    before = ours(x, x, x)[0]
    other = copied(ours)
    assert torch.equal(other(x, x, x)[0], before)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(ours(x, x, x)[0], before)


# --- shapes, strides, dtypes ------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_shapes(batched: bool, batch_first: bool, average: bool, extra: int) -> None:
    m = attn.MultiheadAttention(E, H, batch_first=batch_first, add_bias_kv=extra > 0, add_zero_attn=extra > 1)
    if not batched:
        q, k = inputs(L, E), inputs(S, E)
    elif batch_first:
        q, k = inputs(N, L, E), inputs(N, S, E)
    else:
        q, k = inputs(L, N, E), inputs(S, N, E)
    out, weights = m(q, k, k, average_attn_weights=average)
    assert out.shape == q.shape
    assert out.is_contiguous()
    lead = (N,) if batched else ()
    assert weights.shape == (*lead, *(() if average else (H,)), L, S + extra)
    assert m(q, k, k, need_weights=False)[1] is None
    assert isinstance(m(q, k, k), tuple)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    m = attn.MultiheadAttention(E, H, dtype=dtype)
    x = inputs(L, N, E).to(dtype)
    out, weights = m(x, x, x)
    assert out.dtype == weights.dtype == m(x, x, x, need_weights=False)[0].dtype == dtype


@pytest.mark.parametrize("sizes", [(0, 5, 7), (3, 0, 7), (3, 5, 0), (3, 0, 0), (1, 1, 1)])
@pytest.mark.parametrize("need_weights", [True, False])
def test_sizes_zero_and_one(sizes: tuple[int, int, int], need_weights: bool) -> None:
    stock, ours = pair(batch_first=True)
    n, length, keys = sizes
    q, k = inputs(n, length, E).requires_grad_(), inputs(n, keys, E)
    padding = torch.zeros(n, keys, dtype=torch.bool)
    out, weights = ours(q, k, k, key_padding_mask=padding, need_weights=need_weights)
    expected = stock(q, k, k, need_weights=need_weights)
    assert_close(out, expected[0])
    if need_weights:
        assert_close(weights, expected[1])
    out.sum().backward()
    assert q.grad is not None


# --- masks and hints --------------------------------------------------------------------------------------


def test_mixed_mask_types_warn_and_work() -> None:
    stock, ours = pair()
    x = inputs(L, N, E)
    bool_mask, float_mask = torch.zeros(L, L, dtype=torch.bool), torch.randn(N, L)
    with pytest.warns(UserWarning, match="mismatched key_padding_mask"):
        out = ours(x, x, x, attn_mask=bool_mask, key_padding_mask=float_mask)[0]
    with pytest.warns(UserWarning, match="mismatched key_padding_mask"):
        expected = stock(x, x, x, attn_mask=bool_mask, key_padding_mask=float_mask)[0]
    assert_close(out, expected)


def test_lying_hint_is_believed_where_pytorch_believes_it() -> None:
    stock, ours = pair()
    x = inputs(L, N, E)
    full, none = torch.zeros(L, L, dtype=torch.bool), torch.zeros(N, L, dtype=torch.bool)
    for more in ({"need_weights": False}, {"need_weights": True}, {"need_weights": False, "key_padding_mask": none}):
        expected = stock(x, x, x, attn_mask=full, is_causal=True, **more)[0]
        assert_close(ours(x, x, x, attn_mask=full, is_causal=True, **more)[0], expected)


@pytest.mark.parametrize("extra", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_hint_with_appended_keys_follows_the_mask(extra: dict[str, bool]) -> None:
    stock, ours = pair(**extra)
    x = inputs(L, N, E)
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    right = stock(x, x, x, attn_mask=causal, need_weights=False)[0]
    assert_close(ours(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)[0], right)
    wrong = stock(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)[0]
    with pytest.raises(AssertionError):
        assert_close(wrong, right)


def test_arguments_are_not_written_to() -> None:
    _, ours = pair(add_zero_attn=True)
    x = inputs(L, N, E)
    masks = {"attn_mask": torch.ones(L, L).triu(1).mul(-torch.inf).nan_to_num(0.0, neginf=-torch.inf)}
    masks["key_padding_mask"] = torch.zeros(N, L)
    before = {n: t.clone() for n, t in masks.items()} | {"x": x.clone()}
    ours(x, x, x, **masks)
    assert all(torch.equal(before[n], t) for n, t in {**masks, "x": x}.items())


@pytest.mark.parametrize("kind", ["attn_mask", "key_padding_mask"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_float_masks_get_their_gradient(kind: str, need_weights: bool) -> None:
    stock, ours = pair()
    x = inputs(L, N, E)
    grads = []
    for m in (ours, stock):
        mask = (torch.zeros(L, L) if kind == "attn_mask" else torch.zeros(N, L)).requires_grad_()
        m(x, x, x, need_weights=need_weights, **{kind: mask})[0].square().sum().backward()
        grads.append(mask.grad)
    exact = torch.zeros_like(mask, dtype=torch.float64).requires_grad_()
    twin = copy.deepcopy(stock).double()
    twin(x.double(), x.double(), x.double(), need_weights=need_weights, **{kind: exact})[0].square().sum().backward()
    assert_module_close(grads[0], exact.grad, grads[1])


# --- rows with nothing to attend to -----------------------------------------------------------------------


def dead_row() -> tuple[Tensor, Tensor]:
    """An input (L, N, E) and a mask that hides everything from query 1."""
    mask = torch.zeros(L, L, dtype=torch.bool)
    mask[1] = True
    return inputs(L, N, E), mask


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_dead_rows_are_the_output_bias(need_weights: bool, training: bool) -> None:
    _, ours = pair()
    x, mask = dead_row()
    out, weights = ours.train(training)(x, x, x, attn_mask=mask, need_weights=need_weights)
    assert torch.equal(out[1], ours.out_proj.bias.expand(N, E))
    out[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())
    if need_weights:
        assert torch.equal(weights[:, 1], torch.zeros(N, L))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_masked_rows_nan_is_pytorchs_training_path(need_weights: bool, average: bool) -> None:
    stock, ours = pair()
    ours.masked_rows = "nan"
    x, mask = dead_row()
    options = {"attn_mask": mask, "need_weights": need_weights, "average_attn_weights": average}
    out, weights = ours(x, x, x, **options)
    expected, expected_weights = stock(x, x, x, **options)
    assert bool(expected.isnan().any()) == need_weights
    assert_close(out, expected)
    if need_weights:
        assert_close(weights, expected_weights)


def test_masked_rows_nan_of_one_head() -> None:
    stock, ours = pair()
    ours.masked_rows = "nan"
    mask = torch.zeros(N * H, L, L, dtype=torch.bool)
    mask[2, 1] = True  # of sequence 0 head 2
    x = inputs(L, N, E)
    for average in (True, False):
        got, expected = (m(x, x, x, attn_mask=mask, average_attn_weights=average) for m in (ours, stock))
        assert_close(got[0], expected[0])
        assert_close(got[1], expected[1])


def test_masked_rows_nan_keeps_gradients_finite() -> None:
    _, ours = pair()
    ours.masked_rows = "nan"
    x, mask = dead_row()
    ours(x, x, x, attn_mask=mask)[0][0].sum().backward()
    assert ours.in_proj_weight.grad.isfinite().all()
    ours.masked_rows = "other"
    with pytest.raises(ValueError, match="masked_rows"):
        ours(x, x, x, attn_mask=mask)


def test_nan_behind_a_padding_stays_there() -> None:
    _, ours = pair(batch_first=True)
    x = inputs(N, L, E)
    padding = torch.arange(L) >= torch.tensor([L, 2, 3])[:, None]
    clean = ours(x, x, x, key_padding_mask=padding)[0]
    dirty_input = x.masked_fill(padding[..., None], torch.nan)
    dirty = ours(x, dirty_input, dirty_input, key_padding_mask=padding)[0]
    assert_close(dirty, clean)
