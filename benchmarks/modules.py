"""Modules and layers to time: PyTorch's, and ours with the same parameters; and the check that they agree."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import attn
from attn.benchmarks.peers import Contender
from attn.benchmarks.work import Work, padding_lengths
from attn.testing import assert_module_close, data, spy

STOCK = {"module": "nn.MHA", "layer": "nn.Transformer"}


@dataclass
class ModuleProblem:
    """A module of PyTorch's and one of ours on one input, (B, L, H * D) with gradient in training."""

    work: Work
    stock: nn.Module
    ours: nn.Module
    x: Tensor
    d_out: Tensor
    options: dict[str, Any]

    def call(self, module: nn.Module, x: Tensor | None = None, options: dict[str, Any] | None = None) -> Tensor:
        """The output for the input, or for another."""
        x, options = self.x if x is None else x, self.options if options is None else options
        if self.work.kind == "layer":
            out: Tensor = module(x, **options)
            return out
        found = module(x, x, x, need_weights=bool(self.work.weights), **options)
        out = found[0]
        return out

    def leaves(self, module: nn.Module) -> list[Tensor]:
        """What gradients are wanted of: the input and the parameters."""
        return [self.x, *module.parameters()]

    def contenders(self, backends: tuple[str, ...] = ()) -> list[Contender]:
        """Ours, by each of these backends or by those that the planner takes, and PyTorch's."""
        stock = Contender(STOCK[self.work.kind], lambda: self.call(self.stock))
        if backends:
            forced = {name: functools.partial(attn.use_backend, name) for name in backends}
            return [*(Contender(f"attn {n}", self._call_ours, ours=True, inside=f) for n, f in forced.items()), stock]
        with spy() as calls, torch.set_grad_enabled(self.work.what != "forward"):
            self.call(self.ours)
        served = "+".join(dict.fromkeys(backend for backend, _ in calls)) or "sdpa"
        return [Contender(f"attn {served}", self._call_ours, ours=True), stock]

    def _call_ours(self) -> Tensor:
        return self.call(self.ours)


def problem(work: Work) -> ModuleProblem:
    """The two modules with equal parameters, in eval for a forward pass, else in training without dropout."""
    torch.manual_seed(work.seed)
    E, training = work.H * work.D, work.what != "forward"
    where: dict[str, Any] = {"device": work.device, "dtype": getattr(torch, work.dtype)}
    if work.kind == "module":
        stock: nn.Module = nn.MultiheadAttention(E, work.H, batch_first=True, **where)
        ours: nn.Module = attn.MultiheadAttention(E, work.H, batch_first=True, **where)
        ours.load_state_dict(stock.state_dict())
    else:
        layer = nn.TransformerEncoderLayer(E, work.H, 4 * E, 0.0, batch_first=True, norm_first=True, **where)
        stock = nn.TransformerEncoder(layer, work.layers, enable_nested_tensor=False)
        ours = attn.replace(copy.deepcopy(stock))
    draw = data.Draw(work.seed)
    x, d_out = (draw.normal(work.B, work.L, E).to(**where) for _ in range(2))
    x = x.requires_grad_(training)
    return ModuleProblem(work, stock.train(training), ours.train(training), x, d_out, _options(work))


def _options(work: Work) -> dict[str, Any]:
    """The mask as PyTorch's modules take it."""
    names = {"module": ("attn_mask", "key_padding_mask"), "layer": ("mask", "src_key_padding_mask")}[work.kind]
    if work.mask == "causal":
        dtype = getattr(torch, work.dtype)
        hidden = nn.Transformer.generate_square_subsequent_mask(work.L, device=torch.device(work.device), dtype=dtype)
        return {names[0]: hidden, "is_causal": True}
    if work.mask == "padding":
        past = torch.arange(work.L) >= padding_lengths(work)[:, None]
        return {names[1]: past.to(work.device)}
    return {}


class ModuleExpected:
    """Outputs and gradients of PyTorch's module, and of the same one in float64."""

    def __init__(self, p: ModuleProblem) -> None:
        self.p = p
        options = {
            n: o.double() if isinstance(o, Tensor) and o.is_floating_point() else o for n, o in p.options.items()
        }
        exact = copy.deepcopy(p.stock).double()
        x = p.x.detach().double().requires_grad_(p.x.requires_grad)
        self.exact = _results(lambda: p.call(exact, x, options), [x, *exact.parameters()], p.d_out.double())
        self.stock = _results(lambda: p.call(p.stock), p.leaves(p.stock), p.d_out)

    def worst(self, module: nn.Module) -> float:
        """The largest error over what is allowed beside PyTorch's own. Raises AssertionError where more is wrong."""
        found = _results(lambda: self.p.call(module), self.p.leaves(module), self.p.d_out)
        names = ["out", "d_input", *(f"d_{n}" for n, _ in module.named_parameters())]
        rows = zip(found, self.exact, self.stock, names[: len(found)], strict=True)
        return max(assert_module_close(self._valid(a), self._valid(b), self._valid(c), n) for a, b, c, n in rows)

    def _valid(self, t: Tensor) -> Tensor:
        """Rows of the batch that are no padding: what stands in padding is nobody's promise."""
        if self.p.work.mask != "padding" or t.shape != self.p.x.shape:
            return t
        past = next(iter(self.p.options.values()))
        return t.masked_fill(past[..., None], 0.0)


def _results(call: Callable[[], Tensor], leaves: list[Tensor], d_out: Tensor) -> list[Tensor]:
    if not leaves[0].requires_grad:
        with torch.no_grad():
            return [call()]
    out = call()
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]
