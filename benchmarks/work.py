"""What is timed, as data: a `Work` is one line of text, and everything that runs is made from it.

    attention forward cpu float32 causal B=1 H=8 L=1024 D=64
    module both cpu float32 full weights=mean B=4 H=12 L=128 D=64

The kinds `attention`, `varlen` and `decode` are calls of the functions, `module` is `nn.MultiheadAttention`, `layer` a
stack of `nn.TransformerEncoderLayer`. The passes are `forward` (without autograd), `backward` (of an output that is
there), and `both` (a training step).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from attn import flops
from attn.spec import AttentionSpec, DecodeOperands, Operands, arch_of
from attn.testing import Case, data

CALLS, MODULES = ("attention", "varlen", "decode"), ("module", "layer")
PASSES = ("forward", "backward", "both")
WEIGHTS = ("", "mean")
DTYPES = ("float32", "bfloat16", "float16", "float64")
MASKS: dict[str, dict[str, Any]] = {  # what each changes in the spec and the case
    "full": {},
    "causal": {"band": "start", "causal": True, "right": 0},
    "window": {"band": "start", "left": 128, "right": 128},
    "padding": {"key_lengths": True},
    "documents": {"documents": True},
    "random": {"keep": True},
    "bias": {"bias": True},
    "alibi": {"alibi": True},
    "case": {},  # whatever the line of a case says
}
OF_MODULES = ("full", "causal", "padding")


@dataclass(frozen=True)
class Work:
    """One thing to time. B batch, H query heads, Hkv key heads (0: as many), L queries, S keys (0: L), D head_dim.

    `weights` is nn.MultiheadAttention's need_weights, `layers` the depth of a stack, and `line` the case that a call
    was given as, which then says all the rest.
    """

    kind: str = "attention"
    what: str = "forward"
    device: str = "cpu"
    dtype: str = "float32"
    mask: str = "full"
    weights: str = ""
    B: int = 1
    H: int = 8
    Hkv: int = 0
    L: int = 1024
    S: int = 0
    D: int = 64
    layers: int = 1
    seed: int = 0
    line: str = ""

    def __post_init__(self) -> None:
        known = {"kind": CALLS + MODULES, "what": PASSES, "dtype": DTYPES, "mask": tuple(MASKS), "weights": WEIGHTS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; known: {', '.join(v or repr(v) for v in values)}")
        if min(self.B, self.H, self.L, self.D, self.layers) < 1 or min(self.Hkv, self.S) < 0:
            raise ValueError(f"sizes of {self} must be positive")
        if self.Hkv and self.H % self.Hkv:
            raise ValueError(f"H is {self.H}; it must be a multiple of Hkv={self.Hkv}")
        if self.kind in MODULES and self.mask not in OF_MODULES:
            raise ValueError(f"mask is {self.mask!r}; a {self.kind} takes {', '.join(OF_MODULES)}")
        if self.kind == "varlen" and self.mask not in ("full", "causal", "window", "case"):
            raise ValueError(f"mask is {self.mask!r}; packed sequences take full, causal and window")
        if self.kind == "decode" and self.mask not in ("full", "case"):
            raise ValueError(f"mask is {self.mask!r}; a decoding step takes full: all keys of the cache")
        if self.kind == "decode" and self.what != "forward":
            raise ValueError(f"what is {self.what!r}; decoding has no backward pass")

    def __str__(self) -> str:
        if self.line:
            return f"{self.what} {self.line}"
        words = [self.kind, self.what, self.device, self.dtype, self.mask]
        for f in dataclasses.fields(self)[5:]:
            value = getattr(self, f.name)
            if f.name in ("B", "H", "L", "D") or value != f.default:
                words.append(f"{f.name}={value}")
        return " ".join(words)

    @property
    def label(self) -> str:
        """The sizes for a reader: what a table shows beside the pass and the dtype."""
        case = self.case if self.line else None
        kv, S = (case.Hkv, case.S) if case else (self.Hkv or self.H, self.S or self.L)
        heads = f"H{self.H}" if kv == self.H else f"H{self.H}/{kv}"
        length = f"L{self.L}" if S == self.L else f"L{self.L}x{S}"
        more = [f"{self.layers} layers"] * (self.layers > 1) + ["weights"] * bool(self.weights)
        return " ".join([self.mask, f"B{self.B}", heads, length, f"D{self.D}", *more])

    @property
    def case(self) -> Case:
        """The call as a case of `attn.testing`, for `verify` and `explain`. ValueError for modules."""
        if self.line:
            return Case.parse(self.line)
        if self.kind not in CALLS:
            raise ValueError(f"{self.kind} is no single call, and has no case")
        S = self.S or self.L
        fields: dict[str, Any] = dict(MASKS[self.mask])
        if self.kind == "decode":
            fields = {"band": "end", "causal": True, "key_lengths": True, "lse": True}
        elif self.kind == "varlen" and "band" in fields:
            fields["band"] = "end"
        of_spec = {n: v for n, v in fields.items() if n in AttentionSpec._fields}
        kv, grad = self.Hkv or self.H, self.what != "forward"
        spec = AttentionSpec(
            op=self.kind,
            device=self.device,
            dtype=getattr(torch, self.dtype),
            arch=arch_of(self.device, None),
            head_dim=self.D,
            value_dim=self.D,
            grouped=kv != self.H,
            bias_grad=grad and self.mask == "bias",
            grad=grad,
            **of_spec,
        )
        sizes = {"B": self.B, "Hq": self.H, "Hkv": kv, "L": self.L, "S": S, "seed": self.seed}
        rest = {n: v for n, v in fields.items() if n not in of_spec}
        case = Case(spec, layout="contiguous" if self.kind == "decode" else "transposed", **sizes, **rest)
        case.check()
        return case

    def operands(self) -> Operands | DecodeOperands:
        """The data of the call. Lengths lie between half and all, a dense mask is (1, 1, L, S), a bias (1, H, L, S)."""
        x = self.case.operands()
        if self.line:
            return x
        draw, S = data.Draw(self.seed + 2), self.S or self.L
        lengths = padding_lengths(self).to(x.q.device)
        if isinstance(x, DecodeOperands):
            return x._replace(lengths=lengths)
        if x.cu_seqlens_q is not None:
            return self._packed(x, lengths)
        if x.key_lengths is not None:
            x = x._replace(key_lengths=lengths)
        if x.keep is not None:
            x = x._replace(keep=draw.coin(1, 1, self.L, S).to(x.q.device))
        if x.bias is not None:
            x = x._replace(bias=draw.normal(1, self.H, self.L, S).to(x.q.device, x.q.dtype))
        return x

    def _packed(self, x: Operands, lengths: torch.Tensor) -> Operands:
        """Self-attention of packed sequences: as many keys as queries in each."""
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
        draw, tokens = data.Draw(self.seed), int(bounds[-1])
        heads = (self.H, self.Hkv or self.H, self.Hkv or self.H)
        q, k, v = (draw.normal(1, tokens, n, self.D).transpose(1, 2).to(x.q) for n in heads)
        return x._replace(q=q, k=k, v=v, cu_seqlens_q=bounds, cu_seqlens_k=bounds)


def parse(line: str) -> Work:
    """A work from its line, or from the line of a case. Raises ValueError naming the word that is not understood."""
    if "|" in line:
        return _of_case(line)
    words = line.split()
    if len(words) < 5:
        raise ValueError(f"{line!r} is too short (example: '{Work()}')")
    fields = dataclasses.fields(Work)
    given: dict[str, Any] = dict(zip((f.name for f in fields), words[:5], strict=False))
    kinds = {f.name: type(f.default) for f in fields[5:-1]}
    for word in words[5:]:
        name, _, value = word.partition("=")
        if name not in kinds:
            raise ValueError(f"unknown field {word!r}; known: {', '.join(kinds)}")
        try:
            given[name] = kinds[name](value)
        except ValueError:
            raise ValueError(f"{word!r} needs a whole number") from None
    return Work(**given)


def _of_case(line: str) -> Work:
    """The work of a case line, with a pass before it or without: then forward."""
    first, _, rest = line.strip().partition(" ")
    what, line = (first, rest) if first in PASSES else ("forward", line.strip())
    case = Case.parse(line)
    spec = case.spec
    refused = [name for name in ("dropout", "weights") if getattr(spec, name)]
    if refused:
        raise ValueError(f"{refused[0]} in {line!r}: calls are timed without it (a module can return weights)")
    if what != "forward" and not case.has_gradients:
        raise ValueError(f"{what} of {line!r}, which has no gradients: add 'grad' to its spec")
    sizes = {"B": case.B, "H": case.Hq, "Hkv": case.Hkv, "L": case.L, "S": case.S, "D": spec.head_dim}
    dtype = str(spec.dtype).removeprefix("torch.")
    return Work(spec.op, what, spec.device, dtype, "case", **sizes, seed=case.seed, line=str(case))


@dataclass(frozen=True)
class Cost:
    """What has to be done at least: operations, and bytes read or written once."""

    flops: int
    bytes: int


def cost_of_call(work: Work, x: Operands | DecodeOperands) -> Cost:
    """Visible pairs only; each operand and each result moved once."""
    D, Dv = x.q.shape[-1], (x.v_cache if isinstance(x, DecodeOperands) else x.v).shape[-1]
    pairs = flops.visible_pairs(x)
    forward, backward = flops.forward_per_pair(D, Dv), flops.backward_per_pair(D, Dv)
    per_pair = {"forward": forward, "backward": backward, "both": forward + backward}[work.what]
    read = sum(t.numel() * t.element_size() for t in x if isinstance(t, torch.Tensor))
    if isinstance(x, DecodeOperands):  # of the cache, what the lengths say
        caches = [t.numel() * t.element_size() for t in (x.k_cache, x.v_cache)]
        valid = float(x.lengths.clamp(0).sum()) / max(1, x.lengths.numel() * work.case.S)
        read -= int(sum(caches) * (1 - min(1.0, valid)))
    out = x.q.numel() // D * Dv * x.q.element_size()
    per_pass = {"forward": 1, "backward": 2, "both": 3}[work.what]
    return Cost(pairs * per_pair, per_pass * (read + out))


def cost_of_module(work: Work) -> Cost:
    """Projections, attention over visible pairs and, in a layer, the feed-forward network of 4 E features."""
    E, tokens, size = work.H * work.D, work.B * work.L, getattr(torch, work.dtype).itemsize
    matrices = 4 * E * E + (8 * E * E if work.kind == "layer" else 0)
    x = module_pairs(work)
    forward = 2 * tokens * matrices + x * flops.forward_per_pair(work.D, work.D)
    backward = 4 * tokens * matrices + x * flops.backward_per_pair(work.D, work.D)
    per_pass = {"forward": (forward, 1), "backward": (backward, 2), "both": (forward + backward, 3)}[work.what]
    weights = work.B * work.L * work.L if work.weights else 0
    moved = (matrices + 2 * tokens * E + weights) * size
    return Cost(work.layers * per_pass[0], work.layers * per_pass[1] * moved)


def module_pairs(work: Work) -> int:
    """Visible pairs of the attention inside a module."""
    q = torch.empty(work.B, work.H, work.L, 0)
    x = Operands(q, q, q, right=0 if work.mask == "causal" else -1)
    if work.mask == "padding":
        x = x._replace(key_lengths=padding_lengths(work))
    return flops.visible_pairs(x)


def padding_lengths(work: Work) -> torch.Tensor:
    """int32 (B,): between half of the keys and all, the first sequence full."""
    longest = work.S or work.L
    drawn = data.Draw(work.seed).integers(work.B, max(1, longest // 2), longest)
    drawn[0] = longest
    return drawn
