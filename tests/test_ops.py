"""The ops and the autograd function inside torch: opcheck, compile, export, transforms, higher derivatives."""

import functools
import io
import warnings

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import attn
from attn import functional, masks, ops, rng
from attn.spec import DecodeOperands, Operands
from attn.testing import assert_close

B, H, HKV, L, S, D, DV = 2, 4, 2, 5, 7, 8, 6


def operands(**changes):
    """A call with every kind of operand."""
    return Operands(
        torch.randn(B, H, L, D),
        torch.randn(B, HKV, S, D),
        torch.randn(B, HKV, S, DV),
        bias=torch.randn(1, H, L, S),
        keep=torch.rand(B, 1, L, S) > 0.3,
        alibi_slopes=torch.rand(B, H),
        key_lengths=torch.tensor([S, 3], dtype=torch.int32),
        query_lengths=torch.tensor([4, L], dtype=torch.int32),
        ids_q=torch.randint(0, 2, (B, L)),
        ids_k=torch.randint(0, 2, (B, S)),
        prefix=torch.tensor([1, 2], dtype=torch.int32),
        rng=torch.tensor([5, 6]),
        left=3,
        right=2,
        end=True,
        scale=0.3,
        softcap=4.0,
        dropout_p=0.25,
    )._replace(**changes)


def plain(**changes):
    return Operands(torch.randn(B, H, L, D), torch.randn(B, H, S, D), torch.randn(B, H, S, DV))._replace(**changes)


def packed():
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    x = [torch.randn(1, H, L, D) for _ in range(3)]
    return Operands(*x, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=3, max_seqlen_k=3, right=0)


@pytest.mark.parametrize(
    ("make", "weights"), [(operands, ""), (operands, "mean"), (plain, ""), (plain, "heads"), (packed, "")]
)
def test_opcheck_forward_and_backward(make, weights):
    x = make()
    args = (*x, weights, "reference")
    report = torch.library.opcheck(ops.attention_forward, args)
    assert set(report.values()) == {"SUCCESS"}
    out, m, l, w = ops.attention_forward(*args)
    gradients = (torch.randn_like(out), torch.randn_like(m), torch.randn_like(w) if weights else None)
    back = (*gradients, out, m, l, *x, x.bias is not None, "reference")
    report = torch.library.opcheck(ops.attention_backward, back)
    assert set(report.values()) == {"SUCCESS"}


def test_opcheck_decode():
    cache = torch.randn(6, HKV, 4, D)
    table = torch.tensor([[0, 1, 2], [5, 4, 3]], dtype=torch.int32)
    lengths = torch.tensor([9, 12], dtype=torch.int32)
    x = DecodeOperands(torch.randn(B, H, 2, D), cache, cache, lengths, table)
    report = torch.library.opcheck(ops.decode, (*x, "reference"))
    assert set(report.values()) == {"SUCCESS"}


def sizes(step):
    """Distinct sizes, all >= 3, that change with `step`."""
    return 3 + step, 11 + 2 * step, 23 + 3 * step


def tensors(step, requires_grad):
    b, l, s = sizes(step)
    shapes = ((b, H, l, D), (b, H, s, D), (b, H, s, D))
    return tuple(torch.randn(shape, requires_grad=requires_grad) for shape in shapes)


def same(step, requires_grad):
    return tensors(step, requires_grad)[:1]


def with_ids(step, requires_grad):
    q = tensors(step, requires_grad)[0]
    return q, torch.randint(0, 2, (q.shape[0], q.shape[2]))


def with_lengths(step, requires_grad):
    q, k, v = tensors(step, requires_grad)
    return q, k, v, torch.randint(1, k.shape[2], (k.shape[0],))


CALLS = {
    "plain": (lambda q, k, v: attn.attention(q, k, v), tensors),
    "sdpa": (lambda q, k, v: attn.scaled_dot_product_attention(q, k, v, is_causal=True), tensors),
    "lse": (lambda q, k, v: attn.attention(q, k, v, mask=masks.causal(), return_lse=True), tensors),
    "window": (lambda q, k, v: attn.attention(q, k, v, mask=masks.window(3, 2, "end"), softcap=5.0), tensors),
    "prefix": (lambda q, k, v: attn.attention(q, k, v, mask=masks.prefix_lm(3)), tensors),
    "padding": (lambda q, k, v, n: attn.attention(q, k, v, mask=masks.padding(n) & masks.causal()), with_lengths),
    "documents": (lambda q, ids: attn.attention(q, q, q, mask=masks.documents(ids)), with_ids),
    "documents softcap": (lambda q, ids: attn.attention(q, q, q, mask=masks.documents(ids), softcap=3.0), with_ids),
    "weights": (lambda q: functional.attend(q, q, q, weights="mean", mask=masks.causal())[::2], same),
    "dropout": (lambda q, k, v: attn.attention(q, k, v, dropout_p=1.0), tensors),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_one_graph_serves_all_sizes(name, requires_grad):
    call, make = CALLS[name]
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            given = make(step, requires_grad)
            found, expected = compiled(*given), call(*given)
            for f, e in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True):
                assert_close(f, e)
            if requires_grad:
                wanted = [t for t in given if t.requires_grad]
                results = [r[0] if isinstance(r, tuple) else r for r in (found, expected)]
                first, second = (torch.autograd.grad(r.square().sum(), wanted) for r in results)
                for f, e in zip(first, second, strict=True):
                    assert_close(f, e)


def test_window_sides_are_symbols_in_one_graph():
    torch._dynamo.reset()
    call = lambda q, side: attn.attention(q, q, q, mask=masks.window(side, side), softcap=2.0)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    q = torch.randn(3, H, 9, D)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for side in (2, 3, 4, 6):
            assert_close(compiled(q, side), call(q, side))


def test_the_forced_backend_is_guarded():
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: attn.attention(q, q, q), fullgraph=True, backend="eager")
    q = torch.randn(2, H, L, D)
    with attn.testing.spy() as calls:
        compiled(q)
        with attn.use_backend("reference"):
            compiled(q)
    assert ("reference", "forward") in calls


class Padded(nn.Module):
    def forward(self, q, k, lengths):
        return attn.attention(q, k, k, mask=masks.padding(lengths), return_lse=True)


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_dynamic_sizes(strict):
    b, l, s = Dim("B"), Dim("L"), Dim("S")
    example = (torch.randn(3, H, 5, D), torch.randn(3, H, 7, D), torch.tensor([3, 4, 7]))
    shapes = {"q": {0: b, 2: l}, "k": {0: b, 2: s}, "lengths": {0: b}}
    program = export(Padded(), example, dynamic_shapes=shapes, strict=strict)
    given = (torch.randn(2, H, 6, D), torch.randn(2, H, 9, D), torch.tensor([9, 4]))
    for found, expected in zip(program.module()(*given), Padded()(*given), strict=True):
        assert_close(found, expected)


class Masked(nn.Module):
    def forward(self, q, mask):
        return attn.attention(q, q, q, mask=mask)


@pytest.mark.parametrize("strict", [True, False])
def test_export_takes_masks_as_inputs_and_saves_them(strict):
    mask = masks.padding(torch.tensor([3, 4, 5])) & masks.causal()
    q = torch.randn(3, H, 5, D)
    file = io.BytesIO()
    torch.export.save(export(Masked(), (q, mask), strict=strict), file)
    file.seek(0)
    assert_close(torch.export.load(file).module()(q, mask), Masked()(q, mask))


def causal(q, **options):
    return attn.attention(q[None], q[None], q[None], mask=masks.causal(), **options)[0]


KINDS = [{}, {"softcap": 2.0}]


@pytest.mark.parametrize("options", KINDS)
def test_vmap_and_per_sample_gradients(options):
    x = torch.randn(3, H, L, D, dtype=torch.float64)
    loss = lambda q: causal(q, **options).square().sum()  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(vmap(lambda q: causal(q, **options))(x), torch.stack([causal(q, **options) for q in x]))
        assert_close(vmap(grad(loss))(x), torch.stack([grad(loss)(q) for q in x]))
    q = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(loss(t) for t in q), q)
    assert_close(vmap(grad(loss))(x), expected)


def test_vmap_over_masks_biases_and_output_dims():
    x, lengths = torch.randn(3, H, L, D, dtype=torch.float64), torch.tensor([2, 3, 5])
    call = lambda q, n: attn.attention(q[None], q[None], q[None], mask=masks.padding(n[None]), softcap=3.0)[0]  # noqa: E731
    assert_close(vmap(call)(x, lengths), torch.stack([call(q, n) for q, n in zip(x, lengths, strict=True)]))
    assert_close(vmap(call, in_dims=(3, 0), out_dims=1)(x.movedim(0, 3), lengths), vmap(call, out_dims=1)(x, lengths))
    bias = torch.randn(L, L, dtype=torch.float64)
    loss = lambda q, b: attn.attention(q[None], q[None], q[None], bias=b, softcap=3.0).square().sum()  # noqa: E731
    by_bias = grad(loss, argnums=1)
    assert_close(vmap(by_bias, in_dims=(0, None))(x, bias), torch.stack([by_bias(q, bias) for q in x]))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_with_dropout(randomness):
    x = torch.randn(H, 16, D).expand(3, H, 16, D)
    call = lambda q: attn.attention(q[None], q[None], q[None], dropout_p=0.5)[0]  # noqa: E731
    out = vmap(call, randomness=randomness)(x)
    assert torch.equal(out[0], out[1]) == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(call)(x)


@pytest.mark.parametrize("options", KINDS)
def test_jacobians_and_hessians(options):
    q = torch.randn(1, 2, 2, dtype=torch.float64)
    call = lambda t: causal(t, **options)  # noqa: E731
    expected = torch.autograd.functional.jacobian(call, q)
    assert_close(jacrev(call)(q), expected)
    tangent = torch.randn_like(q)
    assert_close(jvp(call, (q,), (tangent,))[1], torch.einsum("abcdef,def->abc", expected, tangent))
    second = torch.autograd.functional.hessian(lambda t: call(t).square().sum(), q)
    # chains of derivatives cancel: float32's tolerance on float64 numbers
    assert_close(hessian(lambda t: call(t).square().sum())(q), second, dtype=torch.float32)


ALL = [
    {},
    {"softcap": 2.0},
    {"mask": masks.window(1, 1, "end")},
    {"mask": masks.padding(torch.tensor([2, 0]), torch.tensor([3, 1]))},
    {"alibi_slopes": torch.tensor([0.5, 0.2])},
    {"return_lse": True},
]


@pytest.mark.parametrize("options", ALL)
def test_derivatives_first_second_and_forward(options):
    inputs = [torch.randn(2, 2, n, 2, dtype=torch.float64, requires_grad=True) for n in (3, 4, 4)]
    call = lambda *t: attn.attention(*t, **options)  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_derivatives_with_bias_and_weights():
    q, k, v = (torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 2, 1, 3, dtype=torch.float64, requires_grad=True)
    call = lambda *t: functional.attend(*t[:3], bias=t[3], return_lse=True, weights="mean")  # noqa: E731
    assert torch.autograd.gradcheck(call, (q, k, v, bias), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (q, k, v, bias), fast_mode=True)


def test_the_gradient_of_lse_or_weights_alone():
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    _, lse, weights = functional.attend(q, q, q, return_lse=True, weights="heads")
    expected = torch.softmax(q @ q.transpose(-1, -2) / 2, -1)
    assert_close(torch.autograd.grad(weights.square().sum(), q, retain_graph=True)[0],
                 torch.autograd.grad(expected.square().sum(), q)[0])  # fmt: skip
    expected = torch.logsumexp(q @ q.transpose(-1, -2) / 2, -1)
    assert_close(torch.autograd.grad(lse.sum(), q)[0], torch.autograd.grad(expected.sum(), q)[0])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", [{"dropout_p": 0.3}, {"dropout_p": 0.3, "mask": masks.causal(), "softcap": 2.0}])
def test_checkpointing_draws_the_same_dropout(options, reentrant):
    inputs = [torch.randn(B, H, L, D, requires_grad=True) for _ in range(3)]
    call = lambda *t: attn.attention(*t, **options)  # noqa: E731
    results = []
    for run in (call, lambda *t: checkpoint(call, *t, use_reentrant=reentrant)):
        torch.manual_seed(3)
        out = run(*inputs)
        out.square().sum().backward()
        results.append([out.detach(), *(t.grad for t in inputs)])
        for t in inputs:
            t.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_functional_call_on_a_module():
    module = attn.MultiheadAttention(16, 4, batch_first=True).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    changed = {n: torch.randn_like(p) for n, p in module.named_parameters()}
    found = functional_call(module, changed, (x, x, x))[0]
    module.load_state_dict(changed)
    assert_close(found, module(x, x, x)[0])


def test_autocast_casts_query_key_value_only():
    q, k, v = (torch.randn(B, H, L, D) for _ in range(3))
    bias = torch.full((L, L), torch.finfo(torch.float32).min).triu(1)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attn.attention(q, k, v, bias=bias, return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    exact = attn.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias=bias, return_lse=True)[1]
    assert torch.equal(lse, exact)


@pytest.mark.parametrize("backend", [n for n in attn.available_backends() if n != "triton"])
def test_an_output_may_be_changed_in_place_as_pytorchs(backend):
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    results = []
    for call in (functools.partial(attn.scaled_dot_product_attention, backend=backend), F.scaled_dot_product_attention):
        out = call(q, q, q)
        shown = out * 2  # a function that does not need `out` for its gradient
        out[..., 0] = 0
        results.append(shown.detach())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    assert_close(*results)


def test_the_seed_comes_from_torchs_generator():
    q = torch.randn(1, 2, 16, D)
    torch.manual_seed(1)
    first, second = (attn.attention(q, q, q, dropout_p=0.5, backend="reference") for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(attn.attention(q, q, q, dropout_p=0.5, backend="reference"), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    attn.attention(q, q, q)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    seed = rng.draw(q.device)
    x = Operands(q, q, q, rng=seed, scale=D**-0.5, dropout_p=0.5)
    assert torch.equal(ops.attention_forward(*x, "", "reference")[0], first)


@pytest.mark.parametrize("options", [*KINDS, {"return_lse": True}])
def test_vmap_inside_autograd_loses_no_gradient(options):
    def loss(q, k, bias):
        result = attn.attention(q, k, k, bias=bias, **options)
        return sum(t.square().sum() for t in (result if isinstance(result, tuple) else (result,)))

    q = torch.randn(3, B, H, L, D, dtype=torch.float64, requires_grad=True)
    k = torch.randn(B, H, S, D, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, L, S, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(vmap(loss, in_dims=(0, None, 0))(q, k, bias).sum(), (q, k, bias))
    looped = sum(loss(a, k, b) for a, b in zip(q, bias, strict=True))
    for f, e in zip(found, torch.autograd.grad(looped, (q, k, bias)), strict=True):
        assert_close(f, e)
