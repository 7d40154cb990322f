"""Random configurations of `nn.MultiheadAttention`: everything that a call can vary, from one seed each."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
ATTN_MASKS = ("bool", "causal", "float", "float causal", "float 0/-inf", "finfo.min")
PADDINGS = ("suffix", "holes", "float suffix", "float")
FAULTS = (
    "query features",
    "key features",
    "key length",
    "key batch",
    "key dtype",
    "query dims",
    "key dims",
    "mask shape",
    "mask dims",
    "mask integer",
    "mask dtype",
    "padding shape",
    "padding integer",
    "hint without mask",
)


@dataclass
class Config:
    """One configuration; `fault` names what is wrong with it, "" if nothing is."""

    seed: int
    ctor: dict[str, Any]
    dtype: torch.dtype
    batched: bool
    sizes: tuple[int, int, int]  # N, L, S
    same: str  # "qkv": one tensor; "kv": key is value; "": three
    strides: tuple[str, str, str]
    attn_mask: str
    per_head: bool
    padding: str
    mask_grad: bool
    dead_rows: bool
    need_weights: bool
    average: bool
    training: bool
    grad: bool
    is_causal: bool
    loss: str  # "out", "weights" or "both"
    wide_mask: bool  # a float32 attn_mask beside another dtype
    fault: str = ""

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments that are no tensors."""
        return {
            "need_weights": self.need_weights,
            "average_attn_weights": self.average,
            "is_causal": self.is_causal,
        }

    @property
    def follows_mask(self) -> bool:
        """Where PyTorch's result with the hint is not that of the mask, and ours is (docs/differences.md)."""
        extra = self.ctor["add_bias_kv"] or self.ctor["add_zero_attn"]
        return bool(self.is_causal and extra and not self.need_weights)


@dataclass
class Call:
    """The tensors of a call: `query`, `key`, `value` and the masks."""

    tensors: dict[str, Tensor | None] = field(default_factory=dict)

    def copied(self, dtype: torch.dtype) -> Call:
        """Leaves of another dtype, which tensors are one object included; masks that are bool stay bool."""
        made: dict[int, Tensor] = {}
        for t in self.tensors.values():
            if t is None or id(t) in made:
                continue
            leaf = t.detach().to(dtype) if t.is_floating_point() else t.detach()
            # detach() of a tensor that is not converted shares memory: no one writes, and the strides stay.
            made[id(t)] = leaf.requires_grad_(t.requires_grad)
        return Call({n: None if t is None else made[id(t)] for n, t in self.tensors.items()})

    def leaves(self) -> dict[str, Tensor]:
        """Those that get a gradient, by name."""
        return {n: t for n, t in self.tensors.items() if t is not None and t.requires_grad}


def draw(seed: int) -> Config:
    """The configuration of a seed."""
    r = random.Random(seed)
    heads = r.choice((1, 2, 3, 4, 5))
    E = heads * r.choice((1, 2, 3, 4, 8))
    other = r.random() < 0.25
    ctor = {
        "embed_dim": E,
        "num_heads": heads,
        "bias": r.random() < 0.8,
        "add_bias_kv": r.random() < 0.15,
        "add_zero_attn": r.random() < 0.15,
        "kdim": r.choice((None, 3, 6, E)) if other else None,
        "vdim": r.choice((None, 2, 7, E)) if other else None,
        "batch_first": r.random() < 0.6,
    }
    packed = ctor["kdim"] in (None, E) and ctor["vdim"] in (None, E)
    same = r.choice(("qkv", "qkv", "kv", "")) if packed else ""
    lengths = (0, 1, 1, 2, 3, 4, 5, 7, 9, 16, 17) if r.random() < 0.3 else (2, 3, 4, 5, 7, 9)
    L, S = r.choice(lengths), r.choice(lengths)
    attn_mask = r.choice(("", "", *ATTN_MASKS))
    config = Config(
        seed=seed,
        ctor=ctor,
        dtype=r.choice(DTYPES),
        batched=r.random() < 0.85,
        sizes=(r.choice((0, 1, 1, 2, 2, 3, 3, 4)), L, L if same == "qkv" else S),
        same=same,
        strides=tuple(r.choice(("", "", "transposed", "sliced", "expanded")) for _ in range(3)),  # type: ignore[arg-type]
        attn_mask=attn_mask,
        per_head=r.random() < 0.3,
        padding=r.choice(("", "", "", *PADDINGS)),
        mask_grad=r.random() < 0.3,
        dead_rows=r.random() < 0.1,
        need_weights=r.random() < 0.6,
        average=r.random() < 0.6,
        training=r.random() < 0.5,
        grad=r.random() < 0.8,
        is_causal="causal" in attn_mask and r.random() < 0.6,
        loss=r.choice(("out", "weights", "both")),
        wide_mask=r.random() < 0.3,
    )
    if r.random() < 0.12:
        config = replace(config, fault=r.choice(FAULTS))
    return settled(config)


def settled(c: Config) -> Config:
    """Give a configuration what its fault needs in order to show."""
    changes: dict[str, Any] = {}
    if c.need_weights or not c.attn_mask.startswith("float"):
        c = replace(c, wide_mask=False)
    if c.attn_mask == "finfo.min":
        c = replace(c, dead_rows=False)  # PyTorch is run with weights there, and they are NaN in dead rows
    if c.fault in ("mask shape", "mask dims", "mask integer", "mask dtype") and (not c.attn_mask or c.is_causal):
        changes = {"attn_mask": "float" if c.fault == "mask dtype" else "bool", "is_causal": False}
    if c.fault in ("padding shape", "padding integer") and not c.padding:
        changes = {"padding": "suffix"}
    if c.fault == "mask dtype":
        changes |= {"attn_mask": "float", "padding": ""}
    if c.fault in ("key batch", "padding shape"):
        changes |= {"batched": True}
    if c.fault == "hint without mask":
        changes |= {"attn_mask": "", "is_causal": True}
    if c.fault:
        changes |= {"sizes": (2, 3, 3 if c.same == "qkv" else 4), "grad": True, "dead_rows": False}
        changes |= {} if not c.fault.startswith("key") else {"same": "", "sizes": (2, 3, 4)}
    return replace(c, **changes)


def stock_module(c: Config) -> nn.MultiheadAttention:
    """PyTorch's module with every parameter drawn, biases too."""
    g = torch.Generator().manual_seed(c.seed)
    module = nn.MultiheadAttention(**c.ctor)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / max(1, p.shape[-1]) ** 0.5)
    return module.to(c.dtype).train(c.training)


def double(module: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """A float64 copy."""
    return copy.deepcopy(module).double()


def call_of(c: Config) -> Call:
    """The tensors of a configuration, its fault included."""
    g = torch.Generator().manual_seed(c.seed + 1)
    _, L, S = c.sizes
    E = c.ctor["embed_dim"]
    widths = (E, c.ctor["kdim"] or E, c.ctor["vdim"] or E)
    query, key, value = (
        _tensor(c, n, width, kind, g) for n, width, kind in zip((L, S, S), widths, c.strides, strict=True)
    )
    if c.same == "qkv":
        key = value = query
    elif c.same == "kv":
        value = key
    attn_mask, padding = _attn_mask(c, g), _padding(c, g)
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "attn_mask": attn_mask,
        "key_padding_mask": padding,
    }
    _break(c, tensors)
    for name, t in tensors.items():
        if t is not None and t.is_floating_point():
            t.requires_grad_(c.grad and ("mask" not in name or c.mask_grad))
    return Call(tensors)


def _tensor(c: Config, length: int, width: int, kind: str, g: torch.Generator) -> Tensor:
    N = c.sizes[0]
    shape = (length, width) if not c.batched else (N, length, width) if c.ctor["batch_first"] else (length, N, width)
    t = torch.randn(shape, generator=g).to(c.dtype)
    if kind == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "sliced":
        return torch.stack((t, t), -1)[..., 1]
    if kind == "expanded" and len(shape) == 3:
        batch = 0 if c.ctor["batch_first"] else 1
        return t.narrow(batch, 0, min(1, N)).expand(shape)
    return t


def _attn_mask(c: Config, g: torch.Generator) -> Tensor | None:
    if not c.attn_mask:
        return None
    N, L, S = c.sizes
    many = (N if c.batched else 1) * c.ctor["num_heads"]
    shape = (many, L, S) if c.per_head else (L, S)
    dtype = torch.float32 if c.wide_mask else c.dtype
    if c.attn_mask in ("bool", "float 0/-inf"):
        hidden = torch.rand(shape, generator=g) < 0.4
        if not c.dead_rows and S:
            hidden[..., 0] = False
    elif "causal" in c.attn_mask:
        hidden = torch.ones(shape, dtype=torch.bool).triu(1)
    elif c.attn_mask == "finfo.min":
        low = max(torch.finfo(c.dtype).min, torch.finfo(torch.float32).min)
        return torch.zeros(shape, dtype=c.dtype).masked_fill(torch.rand(shape, generator=g) < 0.5, low)
    else:
        return torch.randn(shape, generator=g).to(dtype)
    return _as_float(hidden, dtype) if c.attn_mask.startswith("float") else hidden


def _padding(c: Config, g: torch.Generator) -> Tensor | None:
    if not c.padding:
        return None
    N, _, S = c.sizes
    N = N if c.batched else 1
    least = 0 if c.dead_rows else 1
    if c.padding == "float":
        t = torch.randn((N, S), generator=g).to(c.dtype)
    else:
        lengths = torch.randint(least, max(S, least) + 1, (N, 1), generator=g)
        t = torch.arange(S) >= lengths
        if c.padding == "holes":
            t = torch.rand((N, S), generator=g) < 0.4
        if not c.dead_rows and S:
            t[:, 0] = False
        t = _as_float(t, c.dtype) if c.padding == "float suffix" else t
    return t if c.batched else t[0]


def _as_float(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)


def _break(c: Config, t: dict[str, Any]) -> None:
    """Put the configuration's fault into its tensors."""
    batch = 0 if c.ctor["batch_first"] else 1
    match c.fault:
        case "query features":
            t["query"] = torch.cat((t["query"], t["query"]), -1)
        case "key features":
            t["key"] = torch.cat((t["key"], t["key"]), -1)
            t["value"] = t["value"] if c.ctor["kdim"] or c.ctor["vdim"] else t["key"]
        case "key length":
            at = (0 if not c.ctor["batch_first"] else 1) if c.batched else 0
            t["key"] = torch.cat((t["key"], t["key"]), at)
        case "key batch":
            t["key"], t["value"] = (torch.cat((t[n], t[n]), batch) for n in ("key", "value"))
        case "key dtype":
            other = torch.float32 if c.dtype == torch.float64 else torch.float64
            t["key"], t["value"] = t["key"].to(other), t["value"].to(other)
        case "query dims":
            t["query"] = t["query"][None, None] if c.batched else t["query"][0]
        case "key dims":
            t["key"] = t["key"][0] if c.batched else t["key"][None]
        case "mask shape":
            t["attn_mask"] = t["attn_mask"][..., 1:]
        case "mask dims":
            t["attn_mask"] = t["attn_mask"][(None,) * (4 - t["attn_mask"].dim())]
        case "mask integer":
            t["attn_mask"] = t["attn_mask"].to(torch.uint8)
        case "mask dtype":
            t["attn_mask"] = t["attn_mask"].to(torch.bfloat16 if c.dtype == torch.float64 else torch.float64)
        case "padding shape":
            t["key_padding_mask"] = torch.cat((t["key_padding_mask"], t["key_padding_mask"]))
        case "padding integer":
            t["key_padding_mask"] = t["key_padding_mask"].to(torch.int64)
