"""The `torch.library` ops and the one autograd function above them.

    attn::attention_forward   (operands, weights, backend)                         -> out, m, l, weights
    attn::attention_backward  (gradients, residuals, operands, bias?, backend)     -> dq, dk, dv, d_bias
    attn::decode              (decode operands, backend)                           -> out, lse

The raw ops have schemas, fakes and vmap rules and know no autograd. `attention` differentiates them; its derivative is
again a function whose own derivatives, of any order, come from the reference.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from attn import flops, reference
from attn.backends import load
from attn.backends.base import record
from attn.spec import DecodeOperands, Operands
from attn.vmap import folded, looped

_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? keep, Tensor? alibi_slopes, Tensor? key_lengths, "
    "Tensor? query_lengths, Tensor? ids_q, Tensor? ids_k, Tensor? prefix, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? rng, SymInt left, SymInt right, bool end, SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, "
    "float softcap, float dropout_p"
)
N_TENSORS = Operands._fields.index("rng") + 1
N_OPERANDS = len(Operands._fields)
_BIAS = Operands._fields.index("bias")

_library = torch.library.Library("attn", "DEF")  # type: ignore[no-untyped-call]
_define: Any = functools.partial(_library.define, tags=(torch.Tag.pt2_compliant_tag,))
_impl: Any = _library.impl
_fake: Any = functools.partial(torch.library.register_fake, lib=_library)
_define(
    f"attention_forward({_OPERANDS}, str weights, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
_define(
    "attention_backward(Tensor? d_out, Tensor? d_lse, Tensor? d_weights, Tensor out, Tensor m, Tensor l, "
    f"{_OPERANDS}, bool needs_bias_grad, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
_define(
    "decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? block_table, Tensor? alibi_slopes, "
    "SymInt left, SymInt right, float scale, float softcap, str backend) -> (Tensor, Tensor)",
)


def _attention_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *operands, weights, backend = args
    x = Operands(*operands)
    record(backend, "forward")
    if weights:
        return load(backend).forward_weights(x, weights == "mean")
    return *load(backend).forward(x), x.q.new_empty(0)


def _attention_backward(
    d_out: Tensor | None,
    d_lse: Tensor | None,
    d_weights: Tensor | None,
    out: Tensor,
    m: Tensor,
    l: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *operands, needs_bias_grad, backend = rest
    x = Operands(*operands)
    record(backend, "backward")
    if d_out is None:
        d_out = torch.zeros_like(out)
    dq, dk, dv, d_bias = load(backend).backward(x, (out, m, l), d_out, d_lse, d_weights, needs_bias_grad)
    return dq, dk, dv, x.q.new_empty(0) if d_bias is None else d_bias


def _decode(*args: Any) -> tuple[Tensor, Tensor]:
    *operands, backend = args
    record(backend, "decode")
    return load(backend).decode(DecodeOperands(*operands))


for _name, _run in (
    ("attention_forward", _attention_forward),
    ("attention_backward", _attention_backward),
    ("decode", _decode),
):
    _impl(_name, _run, "CompositeExplicitAutograd")

attention_forward = torch.ops.attn.attention_forward.default
attention_backward = torch.ops.attn.attention_backward.default
decode = torch.ops.attn.decode.default


def _rows(t: Tensor, width: Any) -> Tensor:
    B, H, L, _ = t.shape
    return t.new_empty(B, L, H, width).transpose(1, 2)


@_fake("attn::attention_forward")  # type: ignore[untyped-decorator]
def _fake_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *operands, weights, _ = args
    x = Operands(*operands)
    B, H, L, _ = x.q.shape
    m = x.q.new_empty((B, H, L), dtype=reference.accumulate_dtype(x.q.dtype))
    shape = {"": (0,), "mean": (B, L, x.k.shape[2]), "heads": (B, H, L, x.k.shape[2])}[weights]
    return _rows(x.q, x.v.shape[3]), m, torch.empty_like(m), x.q.new_empty(shape)


@_fake("attn::attention_backward")  # type: ignore[untyped-decorator]
def _fake_backward(
    d_out: Tensor | None,
    d_lse: Tensor | None,
    d_weights: Tensor | None,
    out: Tensor,
    m: Tensor,
    l: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *operands, needs_bias_grad, _ = rest
    x = Operands(*operands)
    d_bias = x.q.new_empty(0)
    if needs_bias_grad and x.bias is not None:
        d_bias = x.bias.new_empty(x.bias.shape)
    dq, dk, dv = (_rows(t, t.shape[3]) for t in (x.q, x.k, x.v))
    return dq, dk, dv, d_bias


@_fake("attn::decode")  # type: ignore[untyped-decorator]
def _fake_decode(*args: Any) -> tuple[Tensor, Tensor]:
    x = DecodeOperands(*args[:-1])
    B, H, L, _ = x.q.shape
    lse = x.q.new_empty((B, H, L), dtype=reference.accumulate_dtype(x.q.dtype))
    return _rows(x.q, x.v_cache.shape[3]), lse


torch.library.register_vmap("attn::attention_forward", folded(attention_forward, 0), lib=_library)
torch.library.register_vmap("attn::attention_backward", folded(attention_backward, 6), lib=_library)
torch.library.register_vmap("attn::decode", looped(decode), lib=_library)


class _Attention(torch.autograd.Function):
    """(out, lse or None, weights or None) of one call; m and l go to backward."""

    generate_vmap_rule = True  # and no jvp: Dynamo refuses functions that have one

    @staticmethod
    def forward(want_lse: bool, needs_bias_grad: bool, *args: Any) -> tuple[Tensor | None, ...]:
        out, m, l, weights = attention_forward(*args)
        return out, reference.lse_of(m, l) if want_lse else None, weights if args[-2] else None, m, l

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        _, needs_bias_grad, *args = inputs
        out, _, _, m, l = output
        _save(ctx, (out, m, l), Operands(*args[:N_OPERANDS]), args[-2], args[-1], needs_bias_grad)
        ctx.mark_non_differentiable(m, l)

    @staticmethod
    def backward(ctx: Any, d_out: Any, d_lse: Any, d_weights: Any, *_: Any) -> tuple[Any, ...]:
        dq, dk, dv, d_bias = _gradients(ctx, d_out, d_lse, d_weights)
        return None, None, dq, dk, dv, d_bias, *(None,) * (N_OPERANDS - 2)


class _Eager(torch.autograd.Function):
    """`_Attention` where neither a compiler nor a transform looks on: the two dozen inputs that those have to see
    would cost more than the kernel of a small call."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        *_, x, weights, backend, want_lse, needs_bias_grad = args  # the first are x.q ... x.bias, for autograd to see
        run = _attention_forward if _nobody_watches(x.q) else attention_forward
        out, m, l, w = run(*x, weights, backend)
        out = out.detach()  # a view returned from here could not be changed in place
        _save(ctx, (out, m, l), x, weights, backend, needs_bias_grad)
        if not want_lse and not weights:
            return out
        return out, reference.lse_of(m, l) if want_lse else None, w if weights else None

    @staticmethod
    def backward(ctx: Any, d_out: Any, d_lse: Any = None, d_weights: Any = None) -> tuple[Any, ...]:
        return *_gradients(ctx, d_out, d_lse, d_weights), None, None, None, None, None


def _save(
    ctx: Any, residuals: tuple[Tensor, ...], x: Operands, weights: str, backend: str, needs_bias_grad: bool
) -> None:
    ctx.save_for_backward(*residuals, *x[:N_TENSORS])
    ctx.call = (x[N_TENSORS:], weights, backend, needs_bias_grad)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_out: Any, d_lse: Any, d_weights: Any) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, d_bias) of a call that `_save` kept."""
    if d_out is None and d_lse is None and d_weights is None:
        return None, None, None, None
    numbers, weights, backend, needs_bias_grad = ctx.call
    saved = ctx.saved_tensors
    args = (d_out, d_lse, d_weights, *saved, *numbers, needs_bias_grad, backend)
    # A function nested in backward crashes Dynamo, and compiled graphs have no second derivative anyhow.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        dq, dk, dv, d_bias = _Backward.apply(weights, *args)  # type: ignore[no-untyped-call]
    else:
        run = _attention_backward if _nobody_watches(saved[0]) else attention_backward
        dq, dk, dv, d_bias = run(*args)
    return dq, dk, None if d_out is None else dv, d_bias if needs_bias_grad else None


class _Backward(torch.autograd.Function):
    """The backward op with derivatives of its own, from the reference."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weights: str, *args: Any) -> tuple[Tensor, ...]:
        return tuple(attention_backward(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.weights, d_out, d_lse, d_weights, _, _, _, *args = inputs
        ctx.save_for_backward(d_out, d_lse, d_weights, *args[:N_TENSORS])
        ctx.rest = tuple(args[N_TENSORS:N_OPERANDS])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *d_grads: Any) -> tuple[Any, ...]:
        d_out, d_lse, d_weights, *tensors = ctx.saved_tensors
        x = Operands(*tensors, *ctx.rest)
        first = (d_out, d_lse, d_weights)
        d_first, d_operands = second_order(x, ctx.weights, first, d_grads)
        return (None, *d_first, None, None, None, *d_operands, *(None,) * (N_OPERANDS - len(d_operands) + 2))


def first_order(x: Operands, weights: str, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """(dq, dk, dv[, d_bias]) by differentiating the reference: itself differentiable, to any order."""
    primals = tuple(t for t in x[: _BIAS + 1] if t is not None)
    wanted = tuple(i for i, g in enumerate(gradients) if g is not None)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        results = reference.attend(x._replace(q=q, k=k, v=v, bias=bias), weights)
        return tuple(results[i] for i in wanted)  # type: ignore[misc]

    _, pull = torch.func.vjp(run, *primals)  # type: ignore[misc]
    grads: tuple[Tensor, ...] = pull(tuple(gradients[i] for i in wanted))
    return grads


def second_order(
    x: Operands, weights: str, gradients: tuple[Tensor | None, ...], d_grads: tuple[Tensor | None, ...]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Derivatives of `first_order` by (d_out, d_lse, d_weights) and by (q, k, v, bias), given those of its results."""
    operands = x[: _BIAS + 1]
    places = [i for i, t in enumerate((*gradients, *operands)) if t is not None]
    n = len(gradients)

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        full: list[Any] = [None] * (n + len(operands))
        for i, t in zip(places, given, strict=True):
            full[i] = t
        return first_order(Operands(*full[n:], *x[_BIAS + 1 :]), weights, tuple(full[:n]))

    given = [(*gradients, *operands)[i] for i in places]
    results, pull = torch.func.vjp(run, *given)  # type: ignore[misc]
    cotangents = tuple(
        torch.zeros_like(r) if g is None or g.shape != r.shape else g for r, g in zip(results, d_grads, strict=False)
    )
    found: list[Tensor | None] = [None] * (n + len(operands))
    for i, g in zip(places, pull(cotangents), strict=True):
        found[i] = g
    return found[:n], found[n:]


class _SecondOrder(torch.autograd.Function):
    """The identity on the output of a whole call. Where a graph of the gradient is asked for, which PyTorch's fused
    kernels lack, it cuts them off and returns the reference's differentiable gradient instead."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Operands, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.rest = x[len(tensors) :]
        return out.detach()  # cheaper than `out` itself, which autograd would turn into a view

    @staticmethod
    def backward(ctx: Any, d_out: Any) -> tuple[Any, ...]:
        tensors = N_OPERANDS - len(ctx.rest)
        if not torch.is_grad_enabled():
            return d_out, None, *(None,) * tensors
        x = Operands(*ctx.saved_tensors, *ctx.rest)
        grads = first_order(x, "", (d_out, None, None))
        return None, None, *grads, *(None,) * (tensors - len(grads))


# The C++ `apply` without the Python one's inspect.signature, which costs more than the rest of a small call.
_eager: Any = super(torch.autograd.Function, _Eager).apply
_fast_second_order: Any = super(torch.autograd.Function, _SecondOrder).apply


def functorch_active() -> bool:
    """Whether a torch.func transform is running."""
    return torch._C._are_functorch_transforms_active()


def _nobody_watches(t: Tensor) -> bool:
    """Whether a raw op may be left out: no tracer, transform, dispatch mode or tensor subclass has to see it."""
    if torch.compiler.is_compiling() or functorch_active():
        return False
    return type(t) is Tensor and torch._C._len_torch_dispatch_stack() == 0


def attention(
    x: Operands, weights: str, backend: str, want_lse: bool, grad: bool, bias_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, lse, weights) by the passes of a backend; `grad` says whether autograd has to record."""
    if not grad:
        if not want_lse and _nobody_watches(x.q):
            record(backend, "forward")
            out, w = load(backend).infer(x, weights)
            return out, None, w
        out, m, l, w = attention_forward(*x, weights, backend)
        return out, reference.lse_of(m, l) if want_lse else None, w if weights else None
    if torch.compiler.is_compiling():
        x = _without_repeats(x)
    elif not functorch_active():
        found = _eager(*x[: _BIAS + 1], x, weights, backend, want_lse, bias_grad)
        return found if want_lse or weights else (found, None, None)
    out, lse, w, _, _ = _Attention.apply(want_lse, bias_grad, *x, weights, backend)  # type: ignore[no-untyped-call]
    return out, lse, w


def _without_repeats(x: Operands) -> Operands:
    """Views in the place of repeated tensors: Dynamo refuses the same tensor twice among a function's inputs."""
    seen: list[Tensor] = []
    fields: dict[str, Any] = {}
    for name, t in zip(x._fields[:N_TENSORS], x[:N_TENSORS], strict=True):
        if isinstance(t, Tensor):
            if any(t is other for other in seen):
                fields[name] = t.view_as(t)
            seen.append(t)
    return x._replace(**fields)


def twice_differentiable(out: Tensor, x: Operands, plain: bool) -> Tensor:
    """`out` of a whole call, with second derivatives from the reference. `plain`: no tensors but q, k, v."""
    if not plain and torch.compiler.is_compiling():
        return out
    result: Tensor = _fast_second_order(out, x, *x[: _BIAS if plain else N_TENSORS])
    return result


flops.tell_counter()
