"""The models: they generate alike with every cache, search as they should, learn, and refuse what is no token."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attn import transformer as tf
from attn.testing import assert_close, spy

E, H, V, N, L, S = 16, 4, 9, 2, 5, 6
CONFIG = tf.LayerConfig(E, H, 24, dropout=0.0, norm_first=True)


def gpt(**options: Any) -> tf.GPT:
    return tf.GPT(V, CONFIG, 2, max_len=24, **options).eval()


def translator() -> tf.EncoderDecoder:
    return tf.EncoderDecoder(V, V + 2, CONFIG, 2, max_len=12).eval()


@pytest.mark.parametrize("positions", ["learned", "rotary", "relative"])
def test_generation_is_the_same_with_every_cache(positions: str) -> None:
    model, prompt = gpt(positions=positions), torch.randint(V, (N, L))
    found = {cache: model.generate(prompt, 12, cache=cache) for cache in ("static", "paged", "none")}
    assert found["none"].shape == (N, L + 12)
    assert torch.equal(found["none"][:, :L], prompt)
    assert torch.equal(found["static"], found["none"])
    assert torch.equal(found["paged"], found["none"])
    with torch.no_grad():
        assert torch.equal(model(found["none"][:, :-1]).argmax(-1)[:, L - 1 :], found["none"][:, L:])


def test_generation_by_chance() -> None:
    model, prompt = gpt(), torch.randint(V, (N, L))
    options = {"temperature": 2.0, "top_k": 3}
    draws = [model.generate(prompt, 12, generator=torch.Generator().manual_seed(n), **options) for n in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    with torch.no_grad():
        ranks = model(draws[0][:, :-1]).argsort(-1, descending=True).argsort(-1)
    taken = ranks.gather(2, draws[0][:, 1:, None])[:, L - 1 :]
    assert int(taken.max()) == 2
    assert torch.equal(model.generate(prompt, 5, temperature=1.0, top_k=1), model.generate(prompt, 5))


def test_a_gpt_learns_a_text() -> None:
    text = torch.arange(24).remainder(V)[None]
    model = tf.GPT(V, CONFIG, 1, max_len=24)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(model.eval().generate(text[:, :4], 20), text)


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["rotary", "relative"])
def test_a_compiled_model_is_one_graph(positions: str) -> None:
    model, tokens = gpt(positions=positions), torch.randint(V, (N, L))
    compiled = torch.compile(model, fullgraph=True)
    for run in (torch.no_grad, torch.enable_grad):
        with run():
            assert_close(compiled(tokens), model(tokens))
    compiled(tokens).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_padding_does_not_reach_bert() -> None:
    model, tokens = tf.BERT(V, CONFIG, 2, max_len=L).eval(), torch.randint(V, (N, L))
    padding = torch.arange(L) >= torch.tensor([[L], [2]])
    with torch.no_grad():
        out = model(tokens, padding)
        changed = model(tokens.masked_fill(padding, 1), padding)
        alone = model(tokens[1:, :2])
    assert_close(out[~padding], changed[~padding])
    assert_close(out[1:, :2], alone)


def test_hiding_follows_the_shares() -> None:
    tokens = torch.randint(1, V, (200, 100))
    padding = torch.arange(100).expand(200, 100) >= 90
    hidden, chosen = tf.hide(tokens, 0, V, padding=padding, generator=torch.Generator().manual_seed(0))
    total = int(chosen.sum())
    assert not bool((chosen & padding).any())
    assert torch.equal(hidden[~chosen], tokens[~chosen])
    left = int((hidden[chosen] == tokens[chosen]).sum())
    masked = int((hidden[chosen] == 0).sum())
    # Standard deviations of binomial counts; the random tokens hit 0 and the token itself once in V each.
    for count, share in ((masked, 0.8 + 0.1 / V), (left, 0.1 + 0.1 / V)):
        assert abs(count - total * share) < 5 * (total * share * (1 - share)) ** 0.5
    assert abs(total - 0.15 * 200 * 90) < 5 * (200 * 90 * 0.15 * 0.85) ** 0.5
    with pytest.raises(ValueError, match=r"share is 1\.5"):
        tf.hide(tokens, 0, V, share=1.5)


def sentences() -> tuple[Tensor, Tensor]:
    return torch.randint(V, (N, S)), torch.arange(S) >= torch.tensor([[S], [3]])


@torch.no_grad()
def test_greedy_takes_the_likeliest() -> None:
    model, (source, padding) = translator(), sentences()
    memory = model.encode(source, padding)
    found = tf.greedy(model.decoder, memory, padding, start=V, end=V + 1, max_new=8)
    tokens = torch.full((N, 1), V)
    for n in range(found.shape[1]):
        step = model(source, tokens, padding)[:, -1].argmax(-1, keepdim=True)
        alive = ~(tokens[:, 1:] == V + 1).any(1)
        assert torch.equal(found[alive, n : n + 1], step[alive])
        assert bool((found[~alive, n] == V + 1).all())
        tokens = torch.cat((tokens, found[:, n : n + 1]), 1)


@torch.no_grad()
def test_a_wide_beam_finds_the_best_of_all() -> None:
    """With a width of all sequences, beam search is exhaustive search."""
    model = tf.EncoderDecoder(V, 4, CONFIG, 1, max_len=4).eval()
    source, end, length, penalty = torch.randint(V, (1, S))[:, :4], 1, 3, 0.6
    model.decoder.embedding.weight.mul_(3.0)
    candidates = set()
    for full in itertools.product(range(4), repeat=length):
        candidates.add(full[: full.index(end) + 1] if end in full else full)

    def value(candidate: tuple[int, ...]) -> float:
        target = torch.tensor([candidate])
        given = torch.cat((torch.full((1, 1), 0), target[:, :-1]), 1)
        log = model(source, given).log_softmax(-1).gather(2, target[..., None]).sum()
        return float(log / len(candidate) ** penalty)

    best = max(candidates, key=value)
    found = tf.beam(model.decoder, model.encode(source), start=0, end=end, max_new=length, width=64)
    assert tuple(found[0].tolist())[: len(best)] == best
    assert set(found[0].tolist()[len(best) :]) <= {end}


@torch.no_grad()
def test_a_beam_of_one_is_greedy() -> None:
    model, (source, padding) = translator(), sentences()
    memory = model.encode(source, padding)
    ends = {"start": V, "end": V + 1, "max_new": 8}
    assert torch.equal(
        tf.beam(model.decoder, memory, padding, width=1, **ends), tf.greedy(model.decoder, memory, padding, **ends)
    )
    together = tf.beam(model.decoder, memory, padding, **ends)
    for n in range(N):
        alone = tf.beam(model.decoder, memory[n : n + 1], padding[n : n + 1], **ends)[0]
        assert torch.equal(together[n, : len(alone)], alone)


@pytest.mark.parametrize("wrong", [V, -1])
def test_ids_outside_of_the_vocabulary(wrong: int) -> None:
    tokens = torch.randint(V, (N, L))
    tokens[1, 3] = wrong
    models = {
        "tokens": [lambda t: gpt()(t), lambda t: tf.BERT(V, CONFIG, 1, L)(t), lambda t: gpt().generate(t, 2)],
        "source": [lambda t: translator()(t, t)],
    }
    for name, calls in models.items():
        for call in calls:
            with spy() as ran, pytest.raises(ValueError, match=rf"{name}\[1, 3\] is {wrong}; it must be in \[0, 8\]"):
                call(tokens)
            assert ran == []


def test_what_is_no_tokens() -> None:
    for wrong, error, words in (
        (torch.rand(N, L), TypeError, "tokens is torch.float32; give an int64 tensor"),
        ([[1, 2]], TypeError, "tokens is list"),
        (torch.zeros(L, dtype=torch.long), ValueError, r"tokens has shape \(5,\); it must be \(N, L\)"),
    ):
        with pytest.raises(error, match=words):
            gpt()(wrong)
        with pytest.raises(error, match=words):
            tf.BERT(V, CONFIG, 1, L)(wrong)


def test_sequences_longer_than_the_model() -> None:
    long = torch.zeros(1, 25, dtype=torch.long)
    with spy() as ran:
        for positions in ("learned", "rotary", "none"):
            with pytest.raises(ValueError, match="max_len=24"):
                gpt(positions=positions)(long)
        with pytest.raises(ValueError, match="max_len=24"):
            gpt().generate(long[:, :20], 5)
        with pytest.raises(ValueError, match="max_len=12"):
            translator().encode(long)
        with pytest.raises(ValueError, match="max_len=5"):
            tf.BERT(V, CONFIG, 1, L)(long)
    assert ran == []
    assert gpt().generate(long[:, :20], 4).shape == (1, 24)


def test_generation_that_cannot_be() -> None:
    model, prompt = gpt(), torch.zeros(1, 2, dtype=torch.long)
    for options, words in (
        ({"cache": "disk"}, "cache is 'disk'; use one of 'static', 'paged', 'none'"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": 0}, "top_k is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            model.generate(prompt, 2, **options)
    with pytest.raises(ValueError, match="new is 0"):
        model.generate(prompt, 0)
    with pytest.raises(ValueError, match="at least one token"):
        model.generate(prompt[:, :0], 2)


def test_snippets_of_the_document_run() -> None:
    page = Path(__file__).resolve().parent.parent / "docs" / "transformer.md"
    snippets, namespace = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL), {}
    assert len(snippets) >= 3
    for snippet in snippets:
        exec(compile(snippet, page.name, "exec"), namespace)
    assert namespace["continued"].shape == (2, 15)
    assert namespace["scores"].shape == (2, 1, 100)
