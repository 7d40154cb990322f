"""What of PyTorch's masks is recognised, when, and that nothing is remembered of them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attn
from attn import masks
from attn.masks import Band, Mask
from attn.module_masks import merged, windowed
from attn.testing import assert_close

B, H, L, S = 3, 2, 5, 5
SIZES = (B, H, L, S)
NEG = -torch.inf


def as_float(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape).masked_fill(hidden, NEG)


def causal() -> Tensor:
    return torch.ones(L, S, dtype=torch.bool).triu(1)


def suffix(*lengths: int) -> Tensor:
    return torch.arange(S) >= torch.tensor(lengths)[:, None]


def parts(mask: Mask | None) -> set[str]:
    """Which parts a mask has."""
    if mask is None:
        return set()
    return {n for n in ("band", "key_lengths", "dense", "also") if getattr(mask, n) not in (None, ())}


@pytest.mark.parametrize("change", [lambda t: t, as_float, lambda t: as_float(t).double() * 1.0])
@pytest.mark.parametrize("per_head", [False, True])
def test_causal_masks_are_bands(change: Any, per_head: bool) -> None:
    t = change(causal())
    t = t.expand(B * H, L, S) if per_head else t
    mask, bias = merged(t, None, SIZES, 0)
    assert mask is not None
    assert mask.band == Band(None, 0, "start")
    assert parts(mask) == {"band"}
    assert bias is None


@pytest.mark.parametrize("change", [lambda t: t, as_float])
def test_padding_at_the_end_is_lengths(change: Any) -> None:
    mask, bias = merged(None, change(suffix(5, 2, 0)), SIZES, 0)
    assert mask is not None
    assert mask.key_lengths.tolist() == [5, 2, 0]
    assert parts(mask) == {"key_lengths"}
    assert bias is None


def test_both_together() -> None:
    mask, bias = merged(as_float(causal()), as_float(suffix(5, 2, 1)), SIZES, 0)
    assert parts(mask) == {"band", "key_lengths"}
    assert bias is None


@pytest.mark.parametrize("t", [torch.zeros(L, S), torch.zeros(L, S, dtype=torch.bool), -torch.zeros(B * H, L, S)])
def test_masks_that_hide_nothing_are_none(t: Tensor) -> None:
    assert merged(t, None, SIZES, 0) == (None, None)
    assert merged(None, t[:B].reshape(-1, S)[:B], SIZES, 0) == (None, None)


def test_other_bool_masks_stay_dense() -> None:
    lower, holes = causal().T.contiguous(), suffix(5, 2, 0).flip(1)
    mask, bias = merged(as_float(lower), holes, SIZES, 0)
    assert parts(mask) == {"dense"}
    assert mask is not None
    assert torch.equal(mask.dense, ~lower[None, None] & ~holes[:, None, None])
    assert bias is None


@pytest.mark.parametrize(
    "t",
    [
        torch.randn(L, S),
        as_float(causal()) + 1.0,
        as_float(causal()).nan_to_num(neginf=torch.finfo(torch.float32).min),
        as_float(causal()).masked_fill(causal().T, torch.nan),
        as_float(causal()).masked_fill(causal().T, torch.inf),
        as_float(causal()).requires_grad_(),
    ],
    ids=["random", "shifted", "finfo.min", "nan", "inf", "requires grad"],
)
def test_other_float_masks_are_added(t: Tensor) -> None:
    mask, bias = merged(t, None, SIZES, 0)
    assert mask is None
    assert bias is t


def test_float_masks_add_up_in_their_dtype() -> None:
    low = torch.full((L, S), torch.finfo(torch.float32).min)
    _, bias = merged(low, low[:B], SIZES, 0)
    assert bias is not None
    assert (bias == NEG).all()  # as in PyTorch: finfo.min twice hides


@pytest.mark.parametrize("extra", [1, 2])
def test_appended_keys_are_seen(extra: int) -> None:
    mask, bias = merged(causal(), as_float(suffix(5, 2, 1)), SIZES, extra)
    assert parts(mask) == {"dense"}
    assert mask is not None
    assert mask.dense.shape == (B, 1, L, S + extra)
    assert mask.dense[..., S:].all()
    _, bias = merged(torch.randn(L, S), None, SIZES, extra)
    assert bias is not None
    assert not bias[..., S:].any()


@pytest.mark.parametrize("window", [(2, 1), (None, 1), (0, None), (None, None)])
def test_windows_with_appended_keys(window: tuple[int | None, int | None]) -> None:
    i, j = torch.arange(L)[:, None], torch.arange(S)
    left, right = (10**6 if side is None else side for side in window)
    seen = (j >= i - left) & (j <= i + right)
    mask = windowed(window, L, S, 2, torch.device("cpu"))
    assert torch.equal(mask.dense, torch.cat([seen, torch.ones(L, 2, dtype=torch.bool)], 1))
    assert windowed(window, L, S, 0, torch.device("cpu")).band == Band(*window)


def test_nothing_is_looked_at_where_that_would_synchronise() -> None:
    meta = torch.zeros(L, S, device="meta")
    assert merged(meta, None, SIZES, 0) == (None, meta)
    mask, bias = merged(causal().to("meta"), None, SIZES, 0)
    assert parts(mask) == {"dense"}
    assert bias is None

    def inside(t: Tensor) -> Tensor:
        mask, _ = merged(t, None, SIZES, 0)
        assert mask is not None
        assert mask.band is None
        return mask.dense.sum()

    assert torch.vmap(inside)(causal()[None].expand(4, L, S)).shape == (4,)


@pytest.mark.parametrize("write", ["in place", "data", "numpy"])
def test_changed_masks_are_looked_at_again(write: str) -> None:
    m = attn.MultiheadAttention(8, H, batch_first=True).eval()
    stock = attn.restore(attn.replace(nn.MultiheadAttention(8, H, batch_first=True)))
    stock.load_state_dict(m.state_dict())
    x, mask = torch.randn(B, L, 8), causal()
    for row in range(1, L):
        assert_close(m(x, x, x, attn_mask=mask)[0], stock(x, x, x, attn_mask=mask)[0])
        if write == "in place":
            mask[row, 0] = True
        elif write == "data":
            mask.data[row, 0] = True
        else:
            mask.numpy()[row, 0] = True
        assert_close(m(x, x, x, attn_mask=mask)[0], stock(x, x, x, attn_mask=mask)[0])


def test_threads_do_not_mix_their_masks() -> None:
    m = attn.MultiheadAttention(8, H, batch_first=True).eval()
    x = torch.randn(B, L, 8)
    wrong: list[int] = []

    def work(seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        for _ in range(30):
            mask = torch.rand(L, S, generator=g) < 0.5
            mask[:, 0] = False
            _, weights = m(x, x, x, attn_mask=mask, average_attn_weights=False)
            if bool(weights.masked_select(mask).any()):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


# --- the module's own arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize("kdim", [None, 6])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("bias", [True, False])
def test_grouped_heads_equal_repeated_ones(kdim: int | None, extra: dict[str, bool], bias: bool) -> None:
    E, heads, groups, D = 16, 4, 2, 4
    m = attn.MultiheadAttention(E, heads, bias, num_kv_heads=groups, kdim=kdim, batch_first=True, **extra)
    wide = nn.MultiheadAttention(E, heads, bias, kdim=kdim, batch_first=True, **extra)
    width = E + 2 * groups * D

    def repeated(t: Tensor) -> Tensor:
        return t.unflatten(0, (groups, D)).repeat_interleave(heads // groups, 0).flatten(0, 1)

    if kdim is None:
        assert m.in_proj_weight.shape == (width, E)
    else:
        assert m.k_proj_weight.shape == (groups * D, kdim)
    state = {}
    for name, p in m.state_dict().items():
        if name in ("in_proj_weight", "in_proj_bias"):
            q, k, v = p.split((E, groups * D, groups * D))
            state[name] = torch.cat([q, repeated(k), repeated(v)])
        elif name in ("k_proj_weight", "v_proj_weight"):
            state[name] = repeated(p)
        elif name in ("bias_k", "bias_v"):
            state[name] = repeated(p[0, 0])[None, None]
        else:
            state[name] = p
    wide.load_state_dict(state)
    x = torch.randn(B, L, E)
    y = torch.randn(B, S, kdim or E)
    value = y if kdim is None else torch.randn(B, S, E)
    for arguments in ((x, y, value), (x, x, x) if kdim is None else (x, y, value)):
        for ours, theirs in zip(m(*arguments), wide(*arguments), strict=True):
            assert_close(ours, theirs)
    assert "num_kv_heads=2" in repr(m)


def test_equal_head_numbers_are_the_stock_form() -> None:
    torch.manual_seed(0)
    a = attn.MultiheadAttention(8, 2)
    torch.manual_seed(0)
    b = attn.MultiheadAttention(8, 2, num_kv_heads=2)
    assert b.num_kv_heads is None
    assert torch.equal(a.in_proj_weight, b.in_proj_weight)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", [{}, {"key_padding_mask": suffix(5, 3, 2)}, {"attn_mask": causal()}])
@pytest.mark.parametrize("extra", [{}, {"add_zero_attn": True}])
def test_windows_are_masks(need_weights: bool, masked: dict[str, Tensor], extra: dict[str, bool]) -> None:
    m = attn.MultiheadAttention(8, 2, batch_first=True, window=(2, 1), **extra)
    twin = attn.MultiheadAttention(8, 2, batch_first=True, **extra)
    twin.load_state_dict(m.state_dict())
    x = torch.randn(B, L, 8)
    distance = torch.arange(S) - torch.arange(L)[:, None]
    outside = (distance < -2) | (distance > 1)
    arguments = masked | {"attn_mask": outside | masked.get("attn_mask", torch.zeros_like(outside))}
    got, expected = (
        m(x, x, x, need_weights=need_weights, **masked),
        twin(x, x, x, need_weights=need_weights, **arguments),
    )
    assert_close(got[0], expected[0])
    if need_weights:
        assert_close(got[1], expected[1])


def test_window_narrows_a_hint() -> None:
    m = attn.MultiheadAttention(8, 2, batch_first=True, window=(1, None))
    x = torch.randn(B, L, 8)
    with_hint = m(x, x, x, attn_mask=causal(), is_causal=True, need_weights=False)[0]
    assert_close(with_hint, m(x, x, x, attn_mask=causal())[0])


def test_rotary_turns_queries_and_keys() -> None:
    m = attn.MultiheadAttention(16, 2, batch_first=True, rotary=attn.Rotary(4))
    x = torch.randn(B, L, 16)
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in nn.functional.linear(x, m.in_proj_weight).chunk(3, -1))
    out = attn.attention(m.rotary(q), m.rotary(k), v)
    assert_close(m(x, x, x)[0], nn.functional.linear(out.transpose(1, 2).flatten(2), m.out_proj.weight))
    moved = torch.cat([torch.randn(B, 3, 16), x], 1)  # a shift of all positions changes nothing
    hide = torch.arange(L + 3) < 3
    late = m(moved, moved, moved, key_padding_mask=hide.expand(B, -1))[0][:, 3:]
    assert_close(late, m(x, x, x)[0])


def test_kept_masks_are_those_of_the_package() -> None:
    assert masks.causal() is masks.CAUSAL
