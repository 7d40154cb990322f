"""Decoding with a cache equals computing the whole sequence; caches that do not suffice say so before any kernel."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from attn import transformer as tf
from attn.testing import assert_close, assert_module_close, spy
from attn.transformer.positions import SCHEMES

E, H, V, N, L = 16, 4, 11, 3, 13
PAGES = ({}, {"block_size": 4}, {"block_size": 1})
CUTS = ([5, 1, 1, 3, 1, 2], [1] * L, [L])


def gpt(positions: str = "learned", **options: Any) -> tf.GPT:
    config = tf.LayerConfig(E, H, 24, 0.1, **options)
    return tf.GPT(V, config, 2, max_len=16, positions=positions).eval()


def stepped(model: tf.GPT, tokens: Tensor, cuts: list[int], **pages: int) -> Tensor:
    cache = model.new_cache(tokens.shape[0], **pages)
    return torch.cat([model.step(part, cache) for part in tokens.split(cuts, 1)], 1)


@torch.no_grad()
def assert_cached(model: tf.GPT, tokens: Tensor, cuts: list[int], **pages: int) -> None:
    whole, exact = model(tokens), copy.deepcopy(model).double()(tokens)
    assert_module_close(stepped(model, tokens, cuts, **pages), exact, whole)


@pytest.mark.parametrize("positions", SCHEMES)
@pytest.mark.parametrize("pages", PAGES, ids=str)
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_steps_equal_the_whole(positions: str, pages: dict[str, int], cuts: list[int]) -> None:
    assert_cached(gpt(positions), torch.randint(V, (N, L)), cuts, **pages)


@pytest.mark.parametrize("positions", ["rotary", "alibi", "relative"])
@pytest.mark.parametrize("pages", PAGES[:2], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"num_kv_heads": 2}, {"window": 3}, {"norm": "rms", "activation": "swiglu", "norm_first": True}, {"bias": False}],
    ids=str,
)
def test_steps_of_other_layers(positions: str, pages: dict[str, int], options: dict[str, Any]) -> None:
    assert_cached(gpt(positions, **options), torch.randint(V, (N, L)), CUTS[0], **pages)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("positions", ["rotary", "alibi", "relative"])
def test_steps_in_other_dtypes(dtype: torch.dtype, positions: str) -> None:
    assert_cached(gpt(positions).to(dtype), torch.randint(V, (N, L)), CUTS[0], block_size=4)


@pytest.mark.parametrize("positions", ["learned", "rotary", "alibi", "relative"])
@pytest.mark.parametrize("pages", PAGES[:2], ids=str)
@torch.no_grad()
def test_prompts_of_different_lengths(positions: str, pages: dict[str, int]) -> None:
    model, lengths = gpt(positions), torch.tensor([5, 2, 4])
    tokens = torch.randint(V, (N, 9))
    cache = model.new_cache(N, **pages)
    model.step(tokens[:, :5], cache)
    cache.advance(0, lengths)
    follow = torch.stack([tokens[n, length : length + 4] for n, length in enumerate(lengths)])
    found = torch.cat([model.step(part, cache) for part in follow.split([1, 2, 1], 1)], 1)
    whole = model(tokens)
    for n, length in enumerate(lengths):
        assert_close(found[n], whole[n, length : length + 4])


@pytest.mark.parametrize("pages", PAGES[:2], ids=str)
@torch.no_grad()
def test_cross_attention_remembers_its_memory(pages: dict[str, int]) -> None:
    model = tf.CrossDecoder(V, tf.LayerConfig(E, H, 24), 2, max_len=16, kdim=7, vdim=5).eval()
    memory, padding = (torch.randn(N, 6, 7), torch.randn(N, 6, 5)), torch.arange(6) >= torch.tensor([[6], [2], [4]])
    tokens = torch.randint(V, (N, L))
    whole, exact = model(tokens, memory, padding), copy.deepcopy(model).double()
    truth = exact(tokens, tuple(t.double() for t in memory), padding)
    cache, memories = model.new_cache(N, **pages), model.remember(memory, padding)
    found = torch.cat([model.step(part, cache, memories) for part in tokens.split(CUTS[0], 1)], 1)
    assert_module_close(found, truth, whole)
    with pytest.raises(ValueError, match=r"key_padding_mask has shape \(3, 5\); it must be \(3, 6\)"):
        model.remember(memory, padding[:, 1:])


@torch.no_grad()
def test_layers_with_length_first() -> None:
    config = tf.LayerConfig(E, H, 24, batch_first=False, causal=True)
    decoder = tf.Decoder(config, 2).eval()
    x, memory = torch.randn(L, N, E), torch.randn(5, N, E)
    cache = tf.KVCache(config, 2, N, 16)
    memories = decoder.remember(memory)
    found = torch.cat([decoder.step(part, cache, memories) for part in x.split(CUTS[0])])
    assert_close(found, decoder(x, memory))


@torch.no_grad()
def test_the_decoding_kernels_run() -> None:
    model = gpt("rotary")
    cache = model.new_cache(N, block_size=4)
    with spy() as first:
        model.step(torch.randint(V, (N, 5)), cache)
    with spy() as later:
        model.step(torch.randint(V, (N, 1)), cache)
    assert "decode" not in {kind for _, kind in first}
    assert [kind for _, kind in later] == ["decode"] * 2


@pytest.mark.parametrize("pages", PAGES[:2], ids=str)
@torch.no_grad()
def test_reordered_sequences_go_on_as_the_chosen(pages: dict[str, int]) -> None:
    model, tokens, rows = gpt("rotary"), torch.randint(V, (N, L)), torch.tensor([2, 0, 2])
    cache = model.new_cache(N, **pages)
    model.step(tokens[:, :6], cache)
    cache.reorder(rows)
    follow = torch.randint(V, (N, 3))
    expected = model(torch.cat((tokens[rows, :6], follow), 1))[:, 6:]
    assert_close(model.step(follow, cache), expected)


@torch.no_grad()
def test_overflow_raises_before_any_kernel() -> None:
    model, tokens = gpt(), torch.randint(V, (N, L))
    cache = model.new_cache(N, 8)
    model.step(tokens[:, :6], cache)
    before = cache.k.clone()
    with spy() as calls, pytest.raises(ValueError, match="cache: 3 new tokens after 6 overflow its capacity of 8"):
        model.step(tokens[:, 6:9], cache)
    assert calls == []
    assert torch.equal(cache.k, before)
    assert_close(model.step(tokens[:, 6:8], cache), model(tokens[:, :8])[:, 6:])


@torch.no_grad()
def test_an_empty_pool_raises_before_any_kernel() -> None:
    model, tokens = gpt(), torch.randint(V, (N, L))
    cache = model.new_cache(N, block_size=4, blocks=5)
    model.step(tokens[:, :4], cache)
    with spy() as calls, pytest.raises(ValueError, match="1 new tokens need 3 pages more; 2 of blocks=5 are free"):
        model.step(tokens[:, 4:5], cache)
    assert calls == []


@torch.no_grad()
def test_pages_outside_of_the_pool_raise() -> None:
    model, tokens = gpt(), torch.randint(V, (N, L))
    for page in (-1, 12):
        cache = model.new_cache(N, block_size=4)
        model.step(tokens[:, :6], cache)
        cache.block_table[1, 0] = page
        with pytest.raises(ValueError, match=rf"block_table\[1, 0\] is {page}; it must be in \[0, 11\]"):
            model.step(tokens[:, 6:7], cache)


@torch.no_grad()
def test_what_a_cache_refuses() -> None:
    model, tokens = gpt(), torch.randint(V, (N, L))
    with pytest.raises(ValueError, match="capacity is 17; the model's max_len is 16"):
        model.new_cache(N, 17)
    with pytest.raises(ValueError, match="blocks is 4, but"):
        model.new_cache(N, blocks=4)
    with pytest.raises(ValueError, match="block_size is 0"):
        model.new_cache(N, block_size=0)
    with pytest.raises(ValueError, match=r"are \(2, 4, 4, 2\); this call needs \(2, 4, 4, 3\)"):
        model.step(tokens, model.new_cache(2))
    cache = model.new_cache(N)
    for wrong, words in ((torch.tensor([0, 3, 1]), r"rows\[1\] is 3"), (torch.arange(2), "rows has shape")):
        with pytest.raises(ValueError, match=words):
            cache.reorder(wrong)
    with pytest.raises(ValueError, match=r"lengths\[0\] is 3"):
        cache.advance(2, torch.tensor([3, 1, 1]))
    with pytest.raises(RuntimeError, match="no dropout"):
        model.train().step(tokens, cache)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no gradient"):
        model.eval().step(tokens, cache)
    layer = tf.EncoderLayer(tf.LayerConfig(E, H)).eval()
    with pytest.raises(ValueError, match="causal=True"):
        layer.step(torch.randn(N, 2, E), cache.layer(0))
