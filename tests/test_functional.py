"""The public calls: PyTorch's function matched argument for argument, and every bad input refused by name."""

import math

import pytest
import torch
from torch.nn import functional as F

import attn
from attn import masks
from attn.testing import assert_close

B, H, L, S, D = 2, 4, 5, 7, 8


def qkv(**options):
    return torch.randn(B, H, L, D, **options), torch.randn(B, H, S, D, **options), torch.randn(B, H, S, D, **options)


SHAPES = [  # query, key, value, mask
    ((5, 8), (7, 8), (7, 3), None),
    ((5, 8), (7, 8), (7, 3), (5, 7)),
    ((2, 5, 8), (2, 7, 8), (2, 7, 8), (2, 5, 7)),
    ((2, 5, 8), (1, 7, 8), (2, 7, 8), (5, 1)),
    ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 3), (2, 1, 5, 7)),
    ((2, 4, 5, 8), (4, 7, 8), (7, 8), (4, 5, 7)),
    ((3, 2, 4, 5, 8), (3, 2, 4, 7, 8), (3, 2, 4, 7, 8), (3, 2, 1, 1, 7)),
    ((3, 2, 4, 5, 8), (2, 4, 7, 8), (1, 1, 7, 8), (5, 7)),
]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_pytorchs_function_is_matched(shapes, kind, backend):
    *inputs, mask_shape = shapes
    inputs = [torch.randn(s, requires_grad=True) for s in inputs]
    options = {"is_causal": kind == "causal", "scale": 0.3}
    if kind in ("bool", "float") and mask_shape is not None:
        options["attn_mask"] = torch.rand(mask_shape) > 0.3 if kind == "bool" else torch.randn(mask_shape)
    results = []
    for call in (F.scaled_dot_product_attention, attn.scaled_dot_product_attention):
        more = {} if call is F.scaled_dot_product_attention else {"backend": backend}
        out = call(*inputs, **options, **more)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for expected, found in zip(*results, strict=True):
        assert_close(found, expected)


def test_grouped_heads_need_enable_gqa():
    q, k = torch.randn(B, 4, L, D), torch.randn(B, 2, S, D)
    assert_close(
        attn.scaled_dot_product_attention(q, k, k, enable_gqa=True),
        F.scaled_dot_product_attention(q, k, k, enable_gqa=True),
    )
    with pytest.raises(RuntimeError, match="enable_gqa=True"):
        attn.scaled_dot_product_attention(q, k, k)
    assert_close(attn.attention(q, k, k), F.scaled_dot_product_attention(q, k, k, enable_gqa=True))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": [1.0]}, TypeError, "query, key, value are list"),
        ({"attn_mask": [True]}, TypeError, "attn_mask is list"),
        ({"attn_mask": torch.ones(L, S, dtype=torch.int64)}, RuntimeError, "int64.*bool"),
        ({"attn_mask": torch.ones(L, S + 1).bool()}, RuntimeError, "masks.dense has shape .5, 8."),
        ({"attn_mask": torch.ones(L, S).bool(), "is_causal": True}, RuntimeError, "attn_mask and is_causal"),
        ({"key": torch.randn(B, H, S, D + 1)}, RuntimeError, "head_dim"),
        ({"value": torch.randn(B, H, S + 1, D)}, RuntimeError, "key and value must agree"),
        ({"key": torch.randn(B, H, S, D).double()}, RuntimeError, "one dtype"),
        ({"dropout_p": 1.5}, RuntimeError, "dropout_p is 1.5"),
        ({"query": torch.randn(D)}, RuntimeError, "at least 2 dims"),
        ({"query": torch.randn(3, H, L, D)}, RuntimeError, "do not broadcast"),
        ({"backend": "nope"}, ValueError, "'nope'"),
    ],
)
def test_scaled_dot_product_attention_refuses(change, error, words):
    q, k, v = qkv()
    with pytest.raises(error, match=words):
        attn.scaled_dot_product_attention(**{"query": q, "key": k, "value": v, **change})


BAD = [
    ({"q": None}, TypeError, "q is NoneType"),
    ({"q": torch.randn(L, D)}, ValueError, r"q has shape \(5, 8\)"),
    ({"q": torch.randn(B, H, L, D).to_sparse()}, ValueError, "q is a nested or sparse tensor"),
    ({"bias": torch.randn(L, S).to_sparse()}, ValueError, "bias is a nested or sparse tensor"),
    ({"k": torch.randn(B + 1, H, S, D)}, ValueError, "batch sizes"),
    ({"v": torch.randn(B, H, S + 1, D)}, ValueError, "length"),
    ({"k": torch.randn(B, 3, S, D), "v": torch.randn(B, 3, S, D)}, ValueError, r"query heads \(4\)"),
    ({"k": torch.randn(B, 0, S, D), "v": torch.randn(B, 0, S, D)}, ValueError, r"query heads \(4\)"),
    ({"q": torch.randn(B, H, L, 0), "k": torch.randn(B, H, S, 0)}, ValueError, "head_dim >= 1"),
    ({"q": torch.randn(B, H, L, D).long()}, TypeError, "q is torch.int64"),
    ({"v": torch.randn(B, H, S, D).half()}, TypeError, "use one dtype"),
    ({"k": torch.empty(B, H, S, D, device="meta")}, ValueError, "k on meta"),
    ({"mask": torch.ones(L, S).bool()}, TypeError, r"masks.dense"),
    ({"mask": "causal"}, TypeError, "mask is str"),
    ({"mask": masks.dense(torch.ones(3, S).bool())}, ValueError, "masks.dense has shape"),
    ({"mask": masks.padding(torch.tensor([1, 2, 3]))}, ValueError, r"must be \(2,\)"),
    ({"mask": masks.padding(torch.tensor([1, 8]))}, ValueError, r"lengths\[1\] is 8; it must be in \[0, 7\]"),
    ({"mask": masks.padding(torch.tensor([-1, 7]))}, ValueError, r"lengths\[0\] is -1"),
    ({"mask": masks.padding(torch.tensor([1, 2]), torch.tensor([6, 0]))}, ValueError, r"query_lengths\[0\] is 6"),
    ({"mask": masks.documents(torch.zeros(B, L).long())}, ValueError, "pair"),
    ({"mask": masks.prefix_lm(torch.tensor([1, 2, 3]))}, ValueError, "prefix_lm n"),
    ({"mask": masks.prefix_lm(torch.tensor([1, -2]))}, ValueError, r"prefix_lm n\[1\] is -2"),
    ({"bias": torch.ones(L, S).bool()}, TypeError, "masks.dense"),
    ({"bias": torch.randn(L, S + 1)}, ValueError, "bias has shape"),
    ({"bias": torch.randn(1, B, H, L, S)}, ValueError, "bias has shape"),
    ({"alibi_slopes": torch.randn(3)}, ValueError, r"alibi_slopes has shape \(3,\)"),
    ({"alibi_slopes": torch.ones(H).long()}, TypeError, "alibi_slopes is torch.int64"),
    ({"alibi_slopes": torch.randn(H, requires_grad=True)}, ValueError, "alibi_slopes requires grad"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
    ({"dropout_p": math.nan}, ValueError, "dropout_p is nan"),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p is str"),
    ({"scale": math.inf}, ValueError, "scale is inf"),
    ({"scale": torch.tensor(1.0)}, TypeError, "scale is Tensor"),
    ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
    ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
    ({"softcap": math.nan}, ValueError, "softcap is nan"),
    ({"backend": "flash"}, ValueError, "'flash'"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_attention_refuses_by_name(change, error, words):
    q, k, v = qkv()
    given = {"q": q, "k": k, "v": v, **change}
    before = {n: t.clone() for n, t in given.items() if isinstance(t, torch.Tensor) and not t.is_meta}
    with pytest.raises(error, match=words):
        attn.attention(**given)
    assert all(torch.equal(given[n].to_dense(), t.to_dense()) for n, t in before.items())


@pytest.mark.parametrize("sizes", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (2, 0, 4, 5), (1, 1, 1, 1)])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_empty_and_single_sizes(sizes, backend):
    b, h, l, s = sizes
    q, k, v = (torch.randn(b, h, n, D, requires_grad=True) for n in (l, s, s))
    out = attn.attention(q, k, v, backend=backend)
    assert out.shape == (b, h, l, D)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert [g.shape for g in gradients] == [t.shape for t in (q, k, v)]
    if s == 0:
        assert torch.equal(out, torch.zeros_like(out))


def test_varlen_is_each_sequence_alone():
    q, k, v = torch.randn(10, H, D), torch.randn(12, 2, D), torch.randn(12, 2, 3)
    cu_q, cu_k = torch.tensor([0, 3, 3, 9], dtype=torch.int32), torch.tensor([0, 4, 6, 11], dtype=torch.int32)
    band = masks.window(2, 1, "end")
    slopes = torch.rand(3, H)
    out, lse = attn.varlen_attention(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, mask=band, alibi_slopes=slopes, return_lse=True
    )
    assert out.shape == (10, H, 3)
    assert lse.shape == (H, 10)
    for n in range(3):
        a, b = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        alone = [t.transpose(0, 1)[None] for t in (q[a], k[b], v[b])]
        expected, lse_alone = attn.attention(*alone, mask=band, alibi_slopes=slopes[n], return_lse=True)
        assert_close(out[a], expected[0].transpose(0, 1))
        assert_close(lse[:, a], lse_alone[0])
    assert torch.equal(out[9:], torch.zeros(1, H, 3))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"cu_seqlens_q": torch.tensor([1, 5])}, ValueError, r"cu_seqlens_q\[0\] is 1"),
        ({"cu_seqlens_q": torch.tensor([0, 4, 3])}, ValueError, "cu_seqlens_q.diff"),
        ({"cu_seqlens_q": torch.tensor([0, 6])}, ValueError, "there are only 5 tokens"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 5])}, ValueError, "equally many"),
        ({"cu_seqlens_q": torch.tensor([0.0, 5.0])}, TypeError, "int32"),
        ({"max_seqlen_q": 2}, ValueError, "the longest sequence in cu_seqlens_q has 5"),
        ({"q": torch.randn(1, 5, H, D)}, ValueError, "tokens, heads, head_dim"),
        ({"k": torch.randn(5, 3, D), "v": torch.randn(5, 3, D)}, ValueError, "multiple of key heads"),
        ({"mask": masks.padding(torch.tensor([5]))}, ValueError, "one band"),
        ({"mask": torch.ones(5, 5)}, TypeError, "takes a band"),
        ({"dropout_p": 2.0}, ValueError, "dropout_p is 2.0"),
    ],
)
def test_varlen_refuses_by_name(change, error, words):
    x, cu = torch.randn(5, H, D), torch.tensor([0, 5], dtype=torch.int32)
    given = {"q": x, "k": x, "v": x, "cu_seqlens_q": cu, "cu_seqlens_k": cu, **change}
    with pytest.raises(error, match=words):
        attn.varlen_attention(**given)


def test_decode_equals_the_last_rows_of_causal_attention():
    q, k, v = torch.randn(B, H, 9, D), torch.randn(B, 2, 9, D), torch.randn(B, 2, 9, D)
    lengths = torch.tensor([9, 6])
    out, lse = attn.decode_attention(q[:, :, -2:], k, v, lengths=lengths, window=(3, 0), return_lse=True)
    for b, n in enumerate(lengths.tolist()):
        seen = (t[b : b + 1, :, :n] for t in (k, v))
        expected, e = attn.attention(q[b : b + 1, :, -2:], *seen, mask=masks.window(3, 0, "end"), return_lse=True)
        assert_close(out[b], expected[0])
        assert_close(lse[b], e[0])


def test_decode_from_pages_is_decode_from_one_cache():
    cache_k, cache_v = torch.randn(B, 2, 12, D), torch.randn(B, 2, 12, D)
    table = torch.tensor([[4, 1, 0], [2, 5, 3]])
    pages = [torch.empty(6, 2, 4, D) for _ in range(2)]
    for paged, cache in zip(pages, (cache_k, cache_v), strict=True):
        for b in range(B):
            for n in range(3):
                paged[table[b, n]] = cache[b, :, 4 * n : 4 * n + 4]
    q, lengths = torch.randn(B, H, 1, D), torch.tensor([10, 3])
    expected = attn.decode_attention(q, cache_k, cache_v, lengths=lengths)
    assert_close(attn.decode_attention(q, *pages, lengths=lengths, block_table=table), expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"lengths": torch.tensor([1, 13])}, ValueError, r"lengths\[1\] is 13"),
        ({"lengths": torch.tensor([1])}, ValueError, r"must be \(2,\)"),
        ({"lengths": torch.tensor([1.0, 2.0])}, TypeError, "lengths is torch.float32"),
        ({"q": torch.randn(B, H, 1, D, requires_grad=True)}, RuntimeError, "no gradient"),
        ({"q": torch.randn(3, H, 1, D), "lengths": torch.tensor([1, 2, 3])}, ValueError, "block_table"),
        ({"block_table": torch.tensor([[0, 1], [1, 2]])}, ValueError, r"block_table\[1, 1\] is 2"),
        ({"block_table": torch.tensor([0, 1])}, ValueError, "pages per sequence"),
        ({"window": (-1, 0)}, ValueError, "left is -1"),
    ],
)
def test_decode_refuses_by_name(change, error, words):
    cache = torch.randn(B, 2, 12, D)
    lengths = torch.tensor([12, 13]) if "block_table" in change else torch.tensor([1, 2])
    given = {"q": torch.randn(B, H, 1, D), "k_cache": cache, "v_cache": cache, "lengths": lengths, **change}
    with pytest.raises(error, match=words):
        attn.decode_attention(**given)


def test_a_page_table_may_hold_anything_past_the_lengths():
    cache = torch.randn(2, 2, 4, D)
    table = torch.tensor([[0, -7], [1, 99]])
    out = attn.decode_attention(torch.randn(B, H, 1, D), cache, cache, lengths=torch.tensor([4, 2]), block_table=table)
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_what_lies_past_the_lengths_never_spreads(backend):
    q, k, v = qkv()
    lengths, query_lengths = torch.tensor([4, 0]), torch.tensor([5, 2])
    for t, n in ((k, lengths), (v, lengths), (q, query_lengths)):
        for b in range(B):
            t[b, :, n[b] :] = math.nan
    for t in (q, k, v):
        t.requires_grad_()
    out = attn.attention(q, k, v, mask=masks.padding(lengths, query_lengths), backend=backend)
    assert out.isfinite().all()
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    for g in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert g.isfinite().all()
        assert torch.equal(g[1], torch.zeros_like(g[1]))


def test_sdpa_on_cpu_would_lose_the_row_sum_of_finfo_min_rows():
    """Why `sdpa` refuses a bias with gradients on CPU: the day this fails, the refusal can go."""
    q, k, v = (torch.randn(1, 1, 4, D, requires_grad=True) for _ in range(3))
    bias = torch.full((4, 4), torch.finfo(torch.float32).min)
    wrong = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, bias).sum(), v)[0]
    right = torch.autograd.grad(attn.attention(q, k, v, bias=bias).sum(), v)[0]
    assert_close(right, torch.ones_like(right))
    assert (wrong - right).abs().max() > 1
    assert "finfo.min" in attn.explain(q, k, v, bias=bias).reasons["sdpa"]
