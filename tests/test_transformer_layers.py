"""Layers and stacks hold PyTorch's parameters: the same weights give the same outputs and gradients, all options."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attn
from attn import transformer as tf
from attn.testing import assert_close, assert_module_close

E, H, F, N, L, S = 16, 4, 24, 3, 6, 5

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")

OPTIONS = [
    {},
    {"norm_first": True},
    {"activation": "gelu", "layer_norm_eps": 1e-3},
    {"bias": False},
    {"batch_first": False},
    {"norm_first": True, "bias": False, "activation": "gelu", "batch_first": False},
]
MASKS = ("none", "causal", "bool", "float", "per head", "padding", "causal and padding", "hint")


def options(given: dict[str, Any]) -> dict[str, Any]:
    return {"d_model": E, "nhead": H, "dim_feedforward": F, "dropout": 0.0, "batch_first": True} | given


def batch(length: int, given: dict[str, Any]) -> Tensor:
    return torch.randn((N, length, E) if given.get("batch_first", True) else (length, N, E))


def padding(length: int) -> Tensor:
    return torch.arange(length) >= torch.tensor([length, 2, length - 1])[:, None]


def drawn(module: nn.Module) -> nn.Module:
    """The module with every parameter drawn: norms and biases too."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module


def arguments(kind: str, prefix: str, padding_name: str, rows: int, columns: int) -> dict[str, Any]:
    """Masks of one attention under the names that a layer gives them."""
    found: dict[str, Any] = {}
    square = torch.ones(rows, columns, dtype=torch.bool).triu(1)
    if kind in ("causal", "causal and padding", "hint"):
        found[f"{prefix}mask"] = square
    if kind == "hint":
        found["is_causal" if prefix == "src_" else f"{prefix}is_causal"] = True
    if kind == "bool":
        hidden = torch.rand(rows, columns) < 0.4
        hidden[:, 0] = False
        found[f"{prefix}mask"] = hidden
    if kind == "float":
        found[f"{prefix}mask"] = torch.randn(rows, columns)
    if kind == "per head":
        found[f"{prefix}mask"] = torch.randn(N * H, rows, columns)
    if "padding" in kind:
        found[padding_name] = padding(columns)
    return found


def doubled(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in kwargs.items()}


def results(module: nn.Module, inputs: list[Tensor], kwargs: dict[str, Any], g: Tensor) -> dict[str, Tensor]:
    """The output, and gradients of inputs and parameters, by name."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = module(*leaves, **kwargs)
    (out * g.to(out.dtype)).sum().backward()
    found = {"out": out.detach()} | {f"input {n}": t.grad for n, t in enumerate(leaves)}
    return found | {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def assert_same(stock: nn.Module, inputs: list[Tensor], kwargs: dict[str, Any], ours: nn.Module | None = None) -> None:
    ours = tf.from_torch(stock) if ours is None else ours
    exact = copy.deepcopy(stock).double()
    g = torch.randn(ours(*inputs, **kwargs).shape)
    mine, theirs = results(ours, inputs, kwargs, g), results(stock, inputs, kwargs, g)
    truth = results(exact, [t.double() for t in inputs], doubled(kwargs), g)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert_module_close(mine[name], truth[name], theirs[name], name)


@pytest.mark.parametrize("given", OPTIONS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_encoder_layer(given: dict[str, Any], mask: str) -> None:
    stock = drawn(nn.TransformerEncoderLayer(**options(given)))
    kwargs = arguments(mask, "src_", "src_key_padding_mask", L, L)
    assert_same(stock, [batch(L, given)], kwargs)


@pytest.mark.parametrize("given", OPTIONS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_decoder_layer(given: dict[str, Any], mask: str) -> None:
    stock = drawn(nn.TransformerDecoderLayer(**options(given)))
    kwargs = arguments(mask, "tgt_", "tgt_key_padding_mask", L, L)
    kwargs |= arguments(mask, "memory_", "memory_key_padding_mask", L, S)
    assert_same(stock, [batch(L, given), batch(S, given)], kwargs)


@pytest.mark.parametrize("given", [{}, {"norm_first": True, "batch_first": False}], ids=str)
def test_whole_transformer_and_its_parts(given: dict[str, Any]) -> None:
    stock = drawn(nn.Transformer(num_encoder_layers=2, num_decoder_layers=2, **options(given)))
    source, target = batch(S, given), batch(L, given)
    kwargs = arguments("causal", "tgt_", "", L, L) | {"memory_key_padding_mask": padding(S)}
    assert_same(stock, [source, target], kwargs | {"src_key_padding_mask": padding(S)})
    assert_same(stock.encoder, [source], {"src_key_padding_mask": padding(S)})
    assert_same(stock.decoder, [target, source], kwargs)


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_causal_by_itself_is_the_causal_mask(kind: type[nn.Module]) -> None:
    stock = drawn(kind(**options({})))
    inputs = [batch(L, {})] if kind is nn.TransformerEncoderLayer else [batch(L, {}), batch(S, {})]
    name = "src_mask" if len(inputs) == 1 else "tgt_mask"
    mask = {name: torch.ones(L, L, dtype=torch.bool).triu(1)}
    ours = tf.from_torch(stock, causal=True)
    assert_close(ours(*inputs), stock(*inputs, **mask))
    assert_same(stock, inputs, mask | {name.replace("mask", "is_causal").replace("src_", ""): True}, ours)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_there_and_back(training: bool, dtype: torch.dtype) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**options({})), 2, nn.LayerNorm(E))
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**options({})), 2)
    for stock in (encoder.layers[0], decoder.layers[0], encoder, decoder, nn.Transformer(**options({}))):
        drawn(stock).to(dtype).train(training)
        next(stock.parameters()).requires_grad_(False)
        ours = tf.from_torch(stock)
        back = tf.to_torch(ours)
        assert type(back) is type(stock)
        for module in (ours, back):
            state = module.state_dict()
            assert list(state) == list(stock.state_dict())
            assert all(torch.equal(t, state[n]) for n, t in stock.state_dict().items())
            assert module.training is training
            assert [p.requires_grad for p in module.parameters()] == [p.requires_grad for p in stock.parameters()]
        inputs = [batch(L, {}).to(dtype)] * (1 if "Encoder" in type(stock).__name__ else 2)
        with torch.no_grad():
            assert_close(ours(*inputs), stock(*inputs))
            assert_close(back(*inputs), stock(*inputs))


def test_same_random_numbers_at_initialisation() -> None:
    pairs = [
        (nn.TransformerEncoderLayer, tf.EncoderLayer),
        (nn.TransformerDecoderLayer, tf.DecoderLayer),
    ]
    for stock, ours in pairs:
        torch.manual_seed(5)
        theirs = stock(**options({})).state_dict()
        torch.manual_seed(5)
        mine = ours(tf.LayerConfig(E, H, F)).state_dict()
        assert all(torch.equal(mine[n], t) for n, t in theirs.items())


def test_converted_models_that_were_replaced() -> None:
    stock = nn.TransformerEncoder(nn.TransformerEncoderLayer(**options({})), 2)
    x = batch(L, {})
    expected = stock(x)
    assert_close(tf.from_torch(attn.replace(stock))(x), expected)


@pytest.mark.parametrize("norm", ["layer", "batch", "rms"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_every_kind_is_its_formula(norm: str, activation: str, norm_first: bool) -> None:
    config = tf.LayerConfig(E, H, F, 0.0, activation, norm, norm_first, num_kv_heads=2)
    layer = drawn(tf.EncoderLayer(config)).double()
    x = batch(L, {}).double()

    def normed(n: int, t: Tensor) -> Tensor:
        p = dict(layer.named_parameters())
        weight, bias = p[f"norm{n}.weight"], p.get(f"norm{n}.bias", 0.0)
        if norm == "rms":
            return t / (t.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight
        dims = (0, 1) if norm == "batch" else (-1,)
        centred = t - t.mean(dims, keepdim=True)
        return centred / (centred.square().mean(dims, keepdim=True) + config.norm_eps).sqrt() * weight + bias

    def inner(t: Tensor) -> Tensor:
        first = layer.linear1(t)
        if activation == "swiglu":
            return layer.linear2(first * layer.linear_gate(t) * torch.sigmoid(layer.linear_gate(t)))
        return layer.linear2(first.clamp(min=0) if activation == "relu" else first * torch.special.ndtr(first))

    def attention(t: Tensor) -> Tensor:
        return layer.self_attn(t, t, t, need_weights=False)[0]

    expected = x
    for n, sublayer in ((1, attention), (2, inner)):
        expected = expected + sublayer(normed(n, expected)) if norm_first else normed(n, expected + sublayer(expected))
    assert_close(layer(x), expected)
    (layer(x).square().sum()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())


def test_batch_norm_without_bias() -> None:
    layer = tf.EncoderLayer(tf.LayerConfig(E, H, F, norm="batch", bias=False))
    assert not [n for n, _ in layer.named_parameters() if n.endswith("bias")]
    assert layer(batch(L, {})).shape == (N, L, E)


def test_dropout_is_in_every_place() -> None:
    x = batch(L, {})
    layer = tf.EncoderLayer(tf.LayerConfig(E, H, F, dropout=1.0, norm_first=True))
    assert torch.equal(layer(x), x)
    assert layer.self_attn.dropout == 1.0
    assert not torch.equal(layer.eval()(x), x)


def test_a_decoder_that_reads_keys_and_values_of_other_widths() -> None:
    layer = tf.DecoderLayer(tf.LayerConfig(E, H, F, 0.0), kdim=7, vdim=5)
    key, value = torch.randn(N, S, 7), torch.randn(N, S, 5)
    x = batch(L, {})
    seen = layer(x, (key, value), memory_key_padding_mask=padding(S))
    key, value = (t.masked_fill(padding(S)[..., None], 9.0) for t in (key, value))
    assert_close(layer(x, (key, value), memory_key_padding_mask=padding(S)), seen)
    assert not torch.equal(layer(x, (key + 1, value)), layer(x, (key, value + 1)))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"norm": "group"}, ValueError, "norm is 'group'; use one of 'layer', 'batch', 'rms'"),
        ({"activation": "tanh"}, ValueError, "activation is 'tanh'; use one of"),
        ({"nhead": 3}, ValueError, "nhead is 3; it must divide d_model=16"),
        ({"d_model": 0}, ValueError, "d_model is 0; it must be >= 1"),
        ({"dim_feedforward": 2.5}, TypeError, "dim_feedforward is 2.5; give an int"),
        ({"dropout": 1.5}, ValueError, "dropout is 1.5"),
        ({"norm_eps": 0.0}, ValueError, "norm_eps is 0.0"),
        ({"window": -1}, ValueError, "-1"),
    ],
)
def test_configs_that_cannot_be(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        tf.LayerConfig(**({"d_model": E, "nhead": H} | change))


def test_stacks_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="num_layers is 0"):
        tf.Encoder(tf.LayerConfig(E, H), 0)
    with pytest.raises(TypeError, match="num_layers is True"):
        tf.Decoder(tf.LayerConfig(E, H), True)


def test_what_pytorch_has_no_form_for() -> None:
    for change, word in (
        ({"norm": "rms"}, "norm='rms'"),
        ({"activation": "swiglu"}, "activation='swiglu'"),
        ({"window": 2}, "window=2"),
        ({"num_kv_heads": 2}, "num_kv_heads=2"),
        ({"rotary": attn.Rotary(4)}, "rotary"),
    ):
        with pytest.raises(TypeError, match=word):
            tf.to_torch(tf.EncoderLayer(tf.LayerConfig(E, H, F, **change)))
    with pytest.raises(TypeError, match="position_bias"):
        tf.to_torch(tf.EncoderLayer(tf.LayerConfig(E, H, F), tf.Alibi(H)))
    with pytest.raises(TypeError, match="position_bias"):
        tf.to_torch(tf.Transformer(tf.LayerConfig(E, H, F), 1, 1, decoder_bias=tf.Alibi(H)))
    with pytest.raises(TypeError, match="Linear"):
        tf.to_torch(nn.Linear(2, 2))


def test_what_we_have_no_form_for() -> None:
    with pytest.raises(TypeError, match="activation is"):
        tf.from_torch(nn.TransformerEncoderLayer(E, H, activation=torch.tanh))
    with pytest.raises(TypeError, match="Linear"):
        tf.from_torch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="Identity"):
        tf.from_torch(nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H), 1, nn.Identity()))
    mixed = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H), 2)
    mixed.layers[1] = nn.TransformerEncoderLayer(E, 2)
    with pytest.raises(TypeError, match="differ"):
        tf.from_torch(mixed)
    with pytest.raises(RuntimeError, match="linear_gate"):
        tf.from_torch(nn.TransformerEncoderLayer(E, H), activation="swiglu")
