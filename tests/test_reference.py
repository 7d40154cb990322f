"""The reference against closed forms, numerical derivatives, loops in Python and its own passes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_calls import DOUBLE, SEED, bias, call
from torch import Tensor

from attn import reference, rng
from attn.spec import Operands
from attn.testing import assert_close, assert_module_close


def dead_bias() -> Tensor:
    t = torch.randn(1, 1, 3, 5, dtype=DOUBLE)
    t[0, 0, 1] = -torch.inf
    t[0, 0, 2, 3] = -torch.inf
    return t.requires_grad_()


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"right": 0},
    "causal end": {"right": 0, "end": True},
    "window": {"left": 1, "right": 1, "end": True},
    "prefix": {"left": 0, "right": 0, "prefix": torch.tensor([2, 0], dtype=torch.int32)},
    "lengths": {"key_lengths": torch.tensor([4, 0]), "query_lengths": torch.tensor([3, 1])},
    "documents": {"ids_q": torch.tensor([[0, 1, 1]] * 2), "ids_k": torch.tensor([[0, 0, 1, 2, 2], [3, 3, 3, 1, 0]])},
    "keep": {"keep": torch.tensor([[True, True, False, True, False], [False] * 5, [True] * 5])[None, None]},
    "bias": {"bias": "full"},
    "bias over heads": {"bias": "row"},
    "bias with a dead row": {"bias": "dead"},
    "alibi": {"alibi_slopes": torch.rand(2, 4, generator=torch.Generator().manual_seed(1)), "end": True},
    "softcap": {"softcap": 1.3},
    "dropout": {"rng": SEED, "dropout_p": 0.4},
    "everything dropped": {"rng": SEED, "dropout_p": 1.0},
    "negative scale": {"scale": -0.4},
    "zero scale": {"scale": 0.0},
    "many": {
        "left": 2, "right": 1, "softcap": 2.0, "rng": SEED, "dropout_p": 0.3, "bias": "full",
        "alibi_slopes": torch.ones(2, 4), "key_lengths": torch.tensor([5, 2]),
    },
}  # fmt: skip


def with_features(name: str) -> Operands:
    fields = dict(FEATURES[name])
    made = {"full": lambda: bias(2, 4, 3, 5), "row": lambda: bias(1, 4, 1, 5), "dead": dead_bias}
    if "bias" in fields:
        fields["bias"] = made[fields["bias"]]()
    return call(**fields)


def by_hand(x: Operands, b: int, h: int, i: int) -> tuple[list[float], float]:
    """(weights before dropout, lse) of one row, score by score in Python."""
    S, L = x.k.shape[2], x.q.shape[2]
    lk = S if x.key_lengths is None else int(x.key_lengths[b])
    lq = L if x.query_lengths is None else int(x.query_lengths[b])
    off = lk - lq if x.end else 0
    g = x.q.shape[1] // x.k.shape[1]
    scores = []
    for j in range(S):
        s = x.scale * sum(
            float(a) * float(c) for a, c in zip(x.q[b, h, i].tolist(), x.k[b, h // g, j].tolist(), strict=True)
        )
        s = x.softcap * math.tanh(s / x.softcap) if x.softcap else s
        if x.alibi_slopes is not None:
            s -= float(x.alibi_slopes[b, h]) * abs(i + lk - lq - j)
        if x.bias is not None:
            s += float(x.bias.expand(2, 4, L, S)[b, h, i, j])
        near = (x.left < 0 or j >= i + off - x.left) and (x.right < 0 or j <= i + off + x.right)
        seen = (near or (x.prefix is not None and j < int(x.prefix[b]))) and j < lk and i < lq
        seen = seen and (x.ids_q is None or int(x.ids_q[b, i]) == int(x.ids_k[b, j]))  # type: ignore[index]
        seen = seen and (x.keep is None or bool(x.keep.expand(2, 4, L, S)[b, h, i, j]))
        scores.append(s if seen else -math.inf)
    top = max(scores)
    if top == -math.inf:
        return [0.0] * S, -math.inf
    total = sum(math.exp(s - top) for s in scores)
    return [math.exp(s - top) / total for s in scores], top + math.log(total)


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_score_by_score(name: str) -> None:
    x = with_features(name)
    out, lse, weights = reference.attend(x, "heads")
    assert weights is not None
    kept = torch.ones(2, 4, 3, 5, dtype=torch.bool)
    if x.rng is not None:
        kept = rng.keep_mask(x.rng, x.dropout_p, 2, 4, 3, 5)
    want_w, want_lse = torch.zeros(2, 4, 3, 5, dtype=DOUBLE), torch.zeros(2, 4, 3, dtype=DOUBLE)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(3)).tolist():
        row, want_lse[b, h, i] = by_hand(x, b, h, i)  # type: ignore[assignment]
        want_w[b, h, i] = torch.tensor(row, dtype=DOUBLE)
    if x.rng is not None:
        want_w = torch.where(kept, want_w / max(1 - x.dropout_p, 1e-300), 0.0)
    assert_close(weights, want_w, "weights")
    assert_close(lse, want_lse, "lse")
    assert_close(out, want_w @ x.v.repeat_interleave(2, 1), "out")


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("weights", ["", "mean", "heads"])
def test_passes_agree_with_autograd(name: str, weights: str) -> None:
    x = with_features(name)
    out, lse, w = reference.attend(x, weights)
    residuals = reference.forward(x)
    assert torch.equal(residuals[0], out)
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    d_w = None if w is None else torch.randn_like(w)
    loss = (out * d_out).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * d_lse).sum()
    if w is not None:
        assert torch.equal(reference.weights(x, *residuals[1:], weights == "mean"), w)
        again = reference.forward_weights(x, weights == "mean")
        assert all(torch.equal(a, b) for a, b in zip(again, (*residuals, w), strict=True))
        loss = loss + (w * d_w).sum()
    leaves = [t for t in x[:4] if t is not None]
    want = torch.autograd.grad(loss, leaves)
    found = reference.backward(x, residuals, d_out, d_lse, d_w, needs_bias_grad=True)
    for label, a, b in zip(("dq", "dk", "dv", "d_bias"), found, want, strict=False):
        assert a is not None
        assert_module_close(a, b, b, label)
        assert not b.isnan().any()


def differentiable(x: Operands, weights: str = "mean") -> tuple[Any, tuple[Tensor, ...]]:
    leaves = tuple(t for t in x[:4] if t is not None)

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        out, lse, w = reference.attend(x._replace(**dict(zip(("q", "k", "v", "bias"), given, strict=False))), weights)
        return out, lse.masked_fill(lse == -torch.inf, 0.0), w  # type: ignore[return-value]

    return run, leaves


@pytest.mark.parametrize("name", FEATURES)
def test_gradcheck_both_modes(name: str) -> None:
    run, leaves = differentiable(with_features(name))
    assert torch.autograd.gradcheck(run, leaves, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("name", ["plain", "lengths", "bias with a dead row", "softcap", "dropout", "many"])
def test_gradgradcheck(name: str) -> None:
    run, leaves = differentiable(with_features(name))
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["lengths", "bias with a dead row", "keep"])
def test_no_nan_in_second_order_around_dead_rows(name: str) -> None:
    run, leaves = differentiable(with_features(name))
    grads = torch.autograd.grad(sum(t.square().sum() for t in run(*leaves)), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    assert all(g.isfinite().all() for g in (*grads, *second))
    _, tangents = torch.func.jvp(run, leaves, tuple(torch.ones_like(t) for t in leaves))
    assert all(t.isfinite().all() for t in tangents)


def test_one_key_returns_its_value() -> None:
    x = call(S=1)
    assert_close(reference.forward(x)[0], x.v.repeat_interleave(2, 1).expand(-1, -1, 3, -1))


def test_equal_keys_return_the_mean() -> None:
    x = call()
    x = x._replace(k=x.k[:, :, :1].expand(-1, -1, 5, -1))
    assert_close(reference.forward(x)[0], x.v.mean(2, keepdim=True).repeat_interleave(2, 1).expand(-1, -1, 3, -1))


def test_two_keys_give_a_sigmoid() -> None:
    x = call(S=2, Hkv=4)
    gap = x.scale * (x.q * (x.k[:, :, :1] - x.k[:, :, 1:])).sum(-1, keepdim=True)
    want = torch.sigmoid(gap) * x.v[:, :, :1] + torch.sigmoid(-gap) * x.v[:, :, 1:]
    assert_close(reference.forward(x)[0], want)


def test_finfo_min_rows_average_forward_and_backward() -> None:
    """An additive mask that is the most negative number throughout hides nothing: every key weighs the same."""
    low = torch.full((1, 1, 3, 8), torch.finfo(torch.float32).min)
    q, k, v = (torch.randn(1, 1, n, 4) for n in (3, 8, 8))
    x = Operands(q, k, v, bias=low)
    residuals = reference.forward(x)
    assert_close(residuals[0], v.mean(2, keepdim=True).expand(-1, -1, 3, -1))
    assert_close(residuals[2], torch.full((1, 1, 3), 8.0))
    d_out = torch.ones(1, 1, 3, 4)
    dv = reference.backward(x, residuals, d_out)[2]
    assert_close(dv, torch.full_like(dv, 3 / 8))


NAN_AND_INF = (torch.nan, torch.inf)


@pytest.mark.parametrize("poison", NAN_AND_INF)
def test_nothing_past_the_lengths_is_read(poison: float) -> None:
    lengths = {"key_lengths": torch.tensor([3, 0]), "query_lengths": torch.tensor([1, 2])}
    x = call(bias=bias(2, 4, 3, 5), **lengths)
    q, k, v, b = (t.detach().clone() for t in (x.q, x.k, x.v, x.bias))  # type: ignore[union-attr]
    for n in range(2):
        q[n, :, lengths["query_lengths"][n] :] = poison
        k[n, :, lengths["key_lengths"][n] :] = poison
        v[n, :, lengths["key_lengths"][n] :] = poison
        b[n, :, lengths["query_lengths"][n] :] = poison
        b[n, :, :, lengths["key_lengths"][n] :] = poison
    dirty = x._replace(**{n: t.requires_grad_() for n, t in zip(("q", "k", "v", "bias"), (q, k, v, b), strict=True)})
    d_out = torch.randn(2, 4, 3, 3, dtype=DOUBLE)
    dirty_d_out = d_out.clone()
    for n in range(2):
        dirty_d_out[n, :, lengths["query_lengths"][n] :] = poison
    for one, other in zip(reference.attend(x, "heads"), reference.attend(dirty, "heads"), strict=True):
        assert torch.equal(one, other)  # type: ignore[arg-type]
    clean = reference.backward(x, reference.forward(x), d_out, needs_bias_grad=True)
    found = reference.backward(dirty, reference.forward(dirty), dirty_d_out, needs_bias_grad=True)
    assert all(torch.equal(a, b) for a, b in zip(clean, found, strict=True))  # type: ignore[arg-type]
    by_autograd = torch.autograd.grad(reference.attend(dirty)[0], [t for t in dirty[:4] if t is not None], dirty_d_out)
    for a, b in zip(by_autograd, clean, strict=True):
        assert_module_close(a, b, b)  # type: ignore[arg-type]


@pytest.mark.parametrize("poison", NAN_AND_INF)
def test_hidden_keys_and_biases_never_show(poison: float) -> None:
    x = call(right=0, bias=bias(1, 1, 3, 5))  # keys 3 and 4 are seen by no query
    k, b = x.k.detach().clone(), x.bias.detach().clone()  # type: ignore[union-attr]
    k[:, :, 3:] = poison
    b[:, :, 0, 1:] = poison
    for one, other in zip(
        reference.attend(x, "heads"), reference.attend(x._replace(k=k, bias=b), "heads"), strict=True
    ):
        assert torch.equal(one, other)  # type: ignore[arg-type]


def test_a_visible_nan_stays_in_its_row() -> None:
    x = call()
    q = x.q.detach().clone()
    q[1, 2, 1, 0] = torch.nan
    out, lse, weights = reference.attend(x._replace(q=q), "heads")
    clean = reference.attend(x, "heads")
    for found, before in zip((out, lse, weights), clean, strict=True):
        assert found is not None
        assert before is not None
        assert found[1, 2, 1].isnan().all()
        found = found.clone()
        found[1, 2, 1] = before[1, 2, 1]
        assert torch.equal(found, before)


def test_gradients_of_hidden_and_dead_weights_are_never_read() -> None:
    x = call(right=0, bias=dead_bias())
    out, _, w = reference.attend(x, "heads")
    assert w is not None
    d_w = torch.randn_like(w)
    dirty = d_w.masked_fill(torch.ones(3, 5, dtype=torch.bool).triu(1), torch.nan)  # hidden by the band
    dirty[:, :, 1] = torch.nan  # a dead row
    residuals = reference.forward(x)
    leaves = [t for t in x[:4] if t is not None]
    clean = torch.autograd.grad(w, leaves, d_w, allow_unused=True, retain_graph=True)
    by_autograd = torch.autograd.grad(w, leaves, dirty, allow_unused=True)
    by_hand = reference.backward(x, residuals, torch.zeros_like(out), None, dirty, True)
    for n in (0, 1, 3):
        assert torch.equal(by_autograd[n], clean[n])
        assert_module_close(by_hand[n], clean[n], clean[n])  # type: ignore[arg-type]


def test_a_dead_row_hides_even_nan_values() -> None:
    x = call(keep=torch.tensor([[True], [False], [True]])[None, None])
    v = torch.full_like(x.v, torch.nan).requires_grad_()
    out = reference.attend(x._replace(v=v))[0]
    assert torch.equal(out[:, :, 1], torch.zeros_like(out[:, :, 1]))
    assert out[:, :, 0].isnan().all()


@pytest.mark.parametrize("sizes", [{"B": 0}, {"L": 0}, {"S": 0}, {"L": 0, "S": 0}])
@pytest.mark.parametrize("more", [{}, {"right": 0, "end": True}, {"rng": SEED, "dropout_p": 0.5}, {"softcap": 1.0}])
def test_empty(sizes: dict[str, int], more: dict[str, Any]) -> None:
    x = call(**sizes, **more)
    out, lse, weights = reference.attend(x, "mean")
    B, H, L, _ = x.q.shape
    assert out.shape == (B, H, L, 3)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf)) or x.k.shape[2]
    assert weights is not None
    assert weights.shape == (B, L, x.k.shape[2])
    grads = reference.backward(x, reference.forward(x), torch.ones_like(out))
    assert all(g is None or not g.any() for g in grads)


def test_out_lies_in_memory_as_the_output_projection_reads_it() -> None:
    for x in (call(), call(B=1, L=6, S=5, cu_seqlens_q=torch.tensor([0, 2, 5]), cu_seqlens_k=torch.tensor([0, 1, 5]))):
        out = reference.forward(x)[0]
        assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


def test_autocast_changes_nothing() -> None:
    q, k, v = (torch.randn(1, 2, 7, 16) for _ in range(3))
    x = Operands(q, k, v)
    plain = reference.forward(x)
    d_out = torch.randn_like(plain[0])
    grads = reference.backward(x, plain, d_out)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(reference.forward(x), plain, strict=True))
        inside = reference.backward(x, plain, d_out)
        assert torch.equal(reference.attend(x)[0], plain[0])
    assert all(torch.equal(a, b) for a, b in zip(inside[:3], grads[:3], strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_results_are_the_float32_ones_rounded(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 7, 16).to(dtype) for _ in range(3))
    wide = reference.forward(Operands(q.float(), k.float(), v.float()))
    out, m, l = reference.forward(Operands(q, k, v))
    assert torch.equal(out, wide[0].to(dtype))
    assert m.dtype == l.dtype == torch.float32
    assert torch.equal(m, wide[1])


def test_it_traces_and_transforms() -> None:
    x = call(right=0, key_lengths=torch.tensor([4, 2]), rng=SEED, dropout_p=0.3, softcap=2.0)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attend(x._replace(q=q, k=k, v=v))[0]

    compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(x.q, x.k, x.v), run(x.q, x.k, x.v))
    jacobian = torch.func.jacrev(run)(x.q, x.k, x.v)
    assert_close(jacobian, torch.func.jacfwd(run)(x.q, x.k, x.v))
    batched = torch.func.vmap(run)(*(torch.stack([t, t]) for t in (x.q, x.k, x.v)))
    assert_close(batched[1], run(x.q, x.k, x.v))
