"""Facts of the field that any attention has to reproduce."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attn
from attn.testing import assert_close

WORDS = {"I": 0, "me": 0, "you": 1, "hit": 2}  # one embedding for one person


def embedded(sentence: str) -> Tensor:
    table = torch.randn(len(WORDS), 12, generator=torch.Generator().manual_seed(0))
    return table[[WORDS[word] for word in sentence.split()]]


@pytest.mark.parametrize("need_weights", [True, False])
def test_without_positions_attention_is_order_blind(need_weights: bool) -> None:
    """'I hit you' and 'you hit me' give each word the same features; with positions they do not."""
    m = attn.MultiheadAttention(12, 3)
    one, other = embedded("I hit you"), embedded("you hit me")
    first, second = (m(x, x, x, need_weights=need_weights)[0] for x in (one, other))
    assert_close(first, second.flip(0))
    aware = attn.MultiheadAttention(12, 3, rotary=attn.Rotary(4))
    aware.load_state_dict(m.state_dict())
    first, second = (aware(x, x, x, need_weights=need_weights)[0] for x in (one, other))
    with pytest.raises(AssertionError):
        assert_close(first, second.flip(0))


def test_a_causal_mask_makes_it_see_order() -> None:
    m = attn.MultiheadAttention(12, 3, window=(None, 0))
    one, other = embedded("I hit you"), embedded("you hit me")
    with pytest.raises(AssertionError):
        assert_close(m(one, one, one)[0], m(other, other, other)[0].flip(0))


def test_five_heads_of_one_hundred() -> None:
    """500 features in 5 heads of 100: no power of two anywhere."""
    stock = nn.MultiheadAttention(500, 5, batch_first=True)
    m = attn.MultiheadAttention(500, 5, batch_first=True)
    m.load_state_dict(stock.state_dict())
    assert m.head_dim == 100
    x = torch.randn(2, 7, 500)
    for ours, theirs in zip(m(x, x, x), stock(x, x, x), strict=True):
        assert_close(ours, theirs)


def test_attention_is_a_weighted_mean() -> None:
    """With equal keys every value counts alike, whatever the query asks."""
    q, v = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 6, 8)
    k = torch.randn(1, 1, 1, 8).expand(1, 1, 6, 8)
    assert_close(attn.attention(q, k, v), v.mean(2, keepdim=True).expand(1, 1, 4, 8))


def test_a_sharp_query_looks_up_one_value() -> None:
    """With keys of unit length and a small temperature, attention is a dictionary."""
    k, v = torch.eye(8)[None, None], torch.randn(1, 1, 8, 8)
    assert_close(attn.attention(k, k, v, scale=1000.0), v)


def test_a_causal_prefix_does_not_depend_on_the_future() -> None:
    m = attn.MultiheadAttention(12, 3, batch_first=True, window=(None, 0), rotary=attn.Rotary(4))
    x = torch.randn(2, 9, 12)
    whole = m(x, x, x)[0]
    for length in (1, 4, 8):
        part = x[:, :length]
        assert_close(m(part, part, part)[0], whole[:, :length])
