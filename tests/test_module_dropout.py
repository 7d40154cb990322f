"""Dropout of our module: distribution, reproducibility, what it draws, its range."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attn
from attn.testing import assert_close

E, H, N, L = 16, 4, 3, 5


def pair(dropout: float) -> tuple[nn.MultiheadAttention, attn.MultiheadAttention]:
    stock = nn.MultiheadAttention(E, H, dropout)
    ours = attn.MultiheadAttention(E, H, dropout)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def test_dropout_draws_from_the_generator_only_in_training() -> None:
    _, ours = pair(dropout=0.5)
    x = inputs(L, N, E)
    before = torch.get_rng_state()
    ours.eval()(x, x, x)
    assert torch.equal(torch.get_rng_state(), before)
    ours.train()(x, x, x)
    assert not torch.equal(torch.get_rng_state(), before)
    ours.dropout = 0.0
    before = torch.get_rng_state()
    ours(x, x, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_reproducible_and_the_same_with_weights() -> None:
    _, ours = pair(dropout=0.5)
    x = inputs(L, N, E)
    results = []
    for need_weights in (True, False, True):
        torch.manual_seed(5)
        results.append(ours(x, x, x, need_weights=need_weights)[0])
    assert_close(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], ours(x, x, x)[0])


def test_returned_weights_are_after_dropout() -> None:
    p, length = 0.25, 64
    stock, ours = pair(dropout=p)
    x = inputs(length, 8, E)
    out, weights = ours(x, x, x, average_attn_weights=False)
    _, kept = ours.eval()(x, x, x, average_attn_weights=False)
    dropped = weights == 0
    count = weights.numel()
    # Six standard deviations of a binomial count.
    assert abs(int(dropped.sum()) - p * count) < 6 * (count * p * (1 - p)) ** 0.5
    assert_close(weights[~dropped], (kept / (1 - p))[~dropped])
    value = ours._heads(x, x, x, True)[2]
    again = (weights @ value).permute(2, 0, 1, 3).flatten(2)
    assert_close(out, nn.functional.linear(again, ours.out_proj.weight, ours.out_proj.bias))
    rate_there = (stock(x, x, x, average_attn_weights=False)[1] == 0).double().mean()
    assert abs(float(rate_there) - float(dropped.double().mean())) < 12 * (p * (1 - p) / count) ** 0.5


@pytest.mark.parametrize("p", [1.5, -0.1, float("nan")])
@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_out_of_range_raises_in_training_only(p: float, need_weights: bool) -> None:
    m = attn.MultiheadAttention(E, H, dropout=p)
    x = inputs(L, N, E)
    assert m.eval()(x, x, x, need_weights=need_weights)[0].isfinite().all()
    with pytest.raises(ValueError, match="dropout is"):
        m.train()(x, x, x, need_weights=need_weights)


def test_dropout_of_everything_leaves_the_bias() -> None:
    _, ours = pair(dropout=1.0)
    x = inputs(L, N, E)
    out, weights = ours(x, x, x)
    assert torch.equal(out, ours.out_proj.bias.expand_as(out))
    assert not weights.any()
