"""Position schemes: attention is blind to order without them and sees it with each."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attn
from attn import transformer as tf
from attn.testing import assert_close
from attn.transformer.positions import SCHEMES

E, H, L = 16, 4, 6
WORDS = {"I": 0, "hit": 1, "you": 2}


def sentence(text: str) -> Tensor:
    return torch.tensor([[WORDS[w] for w in text.split()]])


def encoder(positions: str) -> tf.BERT:
    torch.manual_seed(1)
    config = tf.LayerConfig(E, H, 24, dropout=0.0, norm_first=True)
    model = tf.BERT(len(WORDS), config, 2, max_len=8, positions=positions)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("positions", SCHEMES)
def test_who_hit_whom(positions: str) -> None:
    """The features of I, hit and you in 'I hit you' against 'you hit me' (the same word as I) and 'hit you me'."""
    model = encoder(positions)
    one, mirrored, rotated = (model.encode(sentence(text))[0] for text in ("I hit you", "you hit I", "hit you I"))
    rounding = 100 * torch.finfo(one.dtype).eps * one.abs().max()
    for other, blind in (
        (mirrored[[2, 1, 0]], positions in ("none", "alibi")),
        (rotated[[2, 0, 1]], positions == "none"),
    ):
        if blind:  # ALiBi sees distances, and a mirror keeps them
            assert_close(other, one)
        else:
            assert bool(((one - other).abs().amax(-1)[[0, 2]] > 10 * rounding).all())


@pytest.mark.parametrize("positions", SCHEMES)
def test_gradients_reach_what_is_learned(positions: str) -> None:
    model = encoder(positions)
    model(sentence("I hit you")).square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    biases_of_keys = [n for n in missing if n.endswith("in_proj_bias")]
    assert missing == biases_of_keys
    learned = {
        "learned": "embedding.positions.table",
        "relative": "stack.layers.0.self_attn.position_bias.table.weight",
    }
    assert (positions in learned) == any("position" in n for n, _ in model.named_parameters())
    if positions in learned:
        assert bool(model.get_parameter(learned[positions]).grad.any())


def test_one_hot_is_added_to_the_features() -> None:
    x = torch.randn(2, 5, E)
    out = tf.OneHotPositions(8, E)(x)
    assert_close(out - x, torch.eye(8, E)[:5].expand(2, 5, E))


def test_sinusoids_are_the_formula() -> None:
    table = tf.SinusoidalPositions(50, 10)(torch.zeros(1, 50, 10))[0]
    for p in (0, 1, 7, 49):
        for n in range(10):
            angle = p / 10000 ** (2 * (n // 2) / 10)
            expected = math.cos(angle) if n % 2 else math.sin(angle)
            assert_close(table[p, n], torch.tensor(expected))
    assert tf.SinusoidalPositions(4, 5)(torch.zeros(1, 4, 5)).shape == (1, 4, 5)


@pytest.mark.parametrize("make", [tf.OneHotPositions, tf.LearnedPositions, tf.SinusoidalPositions])
def test_rows_by_position(make: type) -> None:
    module = make(8, E)
    x = torch.randn(2, 3, E)
    at = torch.tensor([[0, 5, 7], [2, 2, 1]])
    whole = module(torch.zeros(1, 8, E))[0]
    assert_close(module(x, at), x + whole[at])
    assert_close(module(x, torch.arange(3)), module(x))
    with pytest.raises(ValueError, match=r"9 tokens is longer than the position table; give max_len >= 9 \(it is 8\)"):
        module(torch.randn(2, 9, E))
    with pytest.raises(ValueError, match=r"positions\[1, 2\] is 8; it must be in \[0, 7\]"):
        module(x, torch.tensor([[0, 1, 2], [6, 7, 8]]))
    with pytest.raises(ValueError, match="x has 4 features"):
        module(torch.randn(2, 3, 4))


def test_alibi_is_the_kernels_own() -> None:
    for heads in (1, 2, 6, 8):
        alibi = tf.Alibi(heads)
        assert len(alibi.slopes) == heads == len(set(alibi.slopes.tolist()))
        q, k, v = torch.randn(3, 2, heads, 5, 8)
        bias = alibi(torch.arange(5), 5)
        assert_close(attn.attention(q, k, v, bias=bias), attn.attention(q, k, v, alibi_slopes=alibi.slopes))
    assert_close(tf.Alibi(8).slopes, 0.5 ** torch.arange(1.0, 9.0))
    assert_close(tf.Alibi(6).slopes[:4], 0.25 ** torch.arange(1.0, 5.0))
    assert_close(tf.Alibi(6).slopes[4:], torch.tensor([0.5, 0.125]))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_bias_puts_distances_into_buckets(bidirectional: bool) -> None:
    module = tf.RelativeBias(H, num_buckets=32, max_distance=128, bidirectional=bidirectional)
    side = 16 if bidirectional else 32
    far = torch.arange(0, 300)
    behind = module.buckets(-far)
    assert behind[: side // 2].tolist() == list(range(side // 2))
    assert bool((behind.diff() >= 0).all())
    assert set(behind.tolist()) == set(range(side))
    assert behind[128:].unique().tolist() == [side - 1]
    ahead = module.buckets(far[1:])
    assert torch.equal(ahead, behind[1:] + 16 if bidirectional else torch.zeros_like(ahead))
    bias = module(torch.arange(3, 6), 9)
    assert bias.shape == (1, H, 3, 9)
    table = module.table.weight
    for i in range(3):
        for j in range(9):
            assert torch.equal(bias[0, :, i, j], table[module.buckets(torch.tensor(j - (3 + i)))])


def test_layers_share_one_learned_bias() -> None:
    model = encoder("relative")
    tables = [p for n, p in model.named_parameters(remove_duplicate=False) if "position_bias" in n]
    assert len(tables) == 2
    assert tables[0] is tables[1]


@pytest.mark.parametrize("positions", SCHEMES)
def test_causal_models_see_no_future(positions: str) -> None:
    model = tf.GPT(9, tf.LayerConfig(E, H, 24, 0.0), 2, max_len=16, positions=positions)
    tokens = torch.randint(9, (2, 10))
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 9
    assert_close(model(changed)[:, :6], model(tokens)[:, :6])
    assert bool((model(changed)[:, 6:] != model(tokens)[:, 6:]).any())


@pytest.mark.parametrize("positions", ["alibi", "relative"])
def test_position_bias_with_masks_weights_and_dropout(positions: str) -> None:
    """What the module returns as weights is softmax of scores with the bias added."""
    config = tf.LayerConfig(E, 1, 24, 0.0)
    bias = tf.Alibi(1) if positions == "alibi" else tf.RelativeBias(1)
    module = tf.Attention(config, position_bias=bias).double()
    x = torch.randn(2, L, E).double()
    padding = torch.arange(L) >= torch.tensor([[L], [3]])
    _, weights = module(x, x, x, key_padding_mask=padding)
    q, k, _ = torch.nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    scores = q @ k.transpose(1, 2) / E**0.5 + bias(torch.arange(L), L)[0]
    assert_close(weights, scores.masked_fill(padding[:, None], -torch.inf).softmax(-1))
    with attn.capture_weights(module) as captured:
        module(x, x, x, key_padding_mask=padding, need_weights=False)
    assert_close(captured[""][0], weights)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tf.OneHotPositions(17, 16), "max_len is 17; one-hot positions need a feature each"),
        (lambda: tf.LearnedPositions(0, 16), "max_len is 0"),
        (lambda: tf.Alibi(0), "nhead is 0"),
        (lambda: tf.RelativeBias(2, 7), "num_buckets is 7"),
        (lambda: tf.RelativeBias(2, 32, 8), "max_distance is 8"),
        (lambda: encoder("circular"), "positions is 'circular'; use one of 'none', 'one-hot'"),
    ],
)
def test_schemes_that_cannot_be(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
