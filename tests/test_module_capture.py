"""`attn.capture_weights`: the weights of a model that runs as usual."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attn
from attn.testing import assert_close

E, H, N, L = 8, 2, 3, 5

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True)
    return attn.replace(nn.TransformerEncoder(layer, 2))


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_weights_of_every_module(average: bool, training: bool) -> None:
    model = encoder().train(training)
    x, padding = torch.randn(N, L, E), torch.arange(L) >= torch.tensor([5, 3, 1])[:, None]
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        with attn.capture_weights(model, average=average) as weights:
            out = model(x, src_key_padding_mask=padding)
            model(x)
        model(x)
    assert_close(out, expected)
    assert list(weights) == ["layers.0.self_attn", "layers.1.self_attn"]
    first = model.layers[0].self_attn
    with torch.no_grad():
        right = first(x, x, x, key_padding_mask=padding, average_attn_weights=average)[1]
    live = ~padding if average else ~padding[:, None].expand(N, H, L)
    for captured in weights.values():
        assert len(captured) == 2
        assert captured[0].shape == ((N, L, L) if average else (N, H, L, L))
        assert_close(captured[1].sum(-1), torch.ones(captured[1].shape[:-1]))
    assert_close(weights["layers.0.self_attn"][0][live], right[live])


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_callers_get_what_they_asked_for(average: bool, wanted: bool) -> None:
    m = attn.MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    plain = m(x, x, x, average_attn_weights=wanted)
    with attn.capture_weights(m, average=average) as weights:
        out, shown = m(x, x, x, average_attn_weights=wanted)
        assert m(x, x, x, need_weights=False)[1] is None
    assert_close(out, plain[0])
    assert_close(shown, plain[1])
    assert shown.requires_grad
    assert [w.requires_grad for w in weights[""]] == [False, False]
    assert weights[""][1].shape == ((N, L, L) if average else (N, H, L, L))


def test_ends_with_the_block_and_nests() -> None:
    m = attn.MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    with attn.capture_weights(m) as outer:
        with attn.capture_weights(m) as inner:
            m(x, x, x)
        with pytest.raises(TypeError), attn.capture_weights(m):
            m(x, x, None)
        m(x, x, x)
    m(x, x, x)
    assert (len(outer[""]), len(inner[""])) == (1, 1)


def test_what_cannot_be_captured() -> None:
    with pytest.raises(ValueError, match=r"holds no attn\.MultiheadAttention"), attn.capture_weights(nn.Linear(2, 2)):
        pass
    model = nn.ModuleDict({"ours": attn.MultiheadAttention(E, H), "theirs": nn.MultiheadAttention(E, H)})
    with pytest.warns(UserWarning, match="not captured.*theirs"), attn.capture_weights(model) as weights:
        pass
    assert weights == {"ours": []}
