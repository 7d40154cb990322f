"""Cases: one line that says a call completely, so that a bug report is a test.

    attention cpu float32 head_dim=16 value_dim=16 band=end causal grad | B=2 Hq=4 Hkv=2 L=33 S=65 right=0 seed=7

Left of the bar stands the spec, right of it sizes, numbers, `layout` (strides), `kind` (what the data is like) and the
seed that everything else comes from. In a varlen case B counts the sequences and L, S bound their lengths; in a decode
case L counts the new queries and S is the capacity of the cache.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from attn.spec import UNBOUNDED, AttentionSpec, DecodeOperands, Operands
from attn.testing import data

SIZES = (1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 33, 40, 63, 64, 65, 96, 127, 129)
HEAD_DIMS = (1, 3, 8, 16, 17, 32, 40, 64, 100, 128)


@dataclass(frozen=True)
class Case:
    """A call with its data. `str(case)` and `Case.parse(line)` are each other's inverse."""

    spec: AttentionSpec
    B: int = 1
    Hq: int = 1
    Hkv: int = 1
    L: int = 1
    S: int = 1
    left: int = UNBOUNDED
    right: int = UNBOUNDED
    scale: float = 0.0
    """0 stands for 1 / sqrt(head_dim), and for 0 where the spec says that the scale is not positive."""
    softcap: float = 2.0
    dropout_p: float = 0.25
    layout: str = "contiguous"
    kind: str = "normal"
    seed: int = 0

    def __str__(self) -> str:
        fields = [f for f in dataclasses.fields(self)[1:] if f.name in _SIZES or getattr(self, f.name) != f.default]
        return f"{self.spec} | {' '.join(f'{f.name}={getattr(self, f.name)}' for f in fields)}"

    @classmethod
    def parse(cls, line: str) -> Case:
        """Read a line back. Raises ValueError naming the word that is wrong, or what does not fit together."""
        left, bar, right = line.partition("|")
        if not bar:
            raise ValueError(f"case line: {line!r} has no '|' between the spec and the sizes")
        kinds: dict[str, type] = {f.name: type(f.default) for f in dataclasses.fields(cls)[1:]}
        given: dict[str, object] = {}
        for word in right.split():
            name, _, value = word.partition("=")
            if name not in kinds:
                raise ValueError(f"case line: unknown field {word!r}; known: {', '.join(kinds)}")
            try:
                given[name] = kinds[name](value)
            except ValueError:
                raise ValueError(f"case line: {word!r} needs {kinds[name].__name__}") from None
        case = cls(AttentionSpec.parse(left), **given)  # type: ignore[arg-type]
        case.check()
        return case

    def check(self) -> None:
        """Raise ValueError where spec, sizes and kind contradict each other."""
        spec = self.spec
        wrong = None
        if self.Hkv < 1 or self.Hq % self.Hkv or spec.grouped != (self.Hq != self.Hkv):
            wrong = f"Hq={self.Hq} Hkv={self.Hkv} against grouped={spec.grouped}"
        elif spec.op != "decode" and bool(spec.band) != (self.left >= 0 or self.right >= 0):
            wrong = f"left={self.left} right={self.right} against band={spec.band!r}"
        elif self.layout not in data.LAYOUTS:
            wrong = f"layout={self.layout}; known: {', '.join(data.LAYOUTS)}"
        elif self.kind not in data.KINDS:
            wrong = f"kind={self.kind}; known: {', '.join(data.KINDS)}"
        elif not data.fits(self.kind, spec):
            wrong = f"kind={self.kind} needs one of: {', '.join(data.KINDS[self.kind])}"
        elif self.layout == "broadcast" and self.kind in data.PER_BATCH:
            wrong = f"layout=broadcast would carry the NaN of kind={self.kind} to other sequences"
        if wrong:
            raise ValueError(f"case line: {wrong}")

    @property
    def factor(self) -> float:
        """The scale of the scores."""
        if not self.spec.scale_positive:
            return min(self.scale, 0.0)
        return self.scale or self.spec.head_dim**-0.5

    @property
    def gated(self) -> bool:
        """Whether the data is ordinary enough for the root mean square gate."""
        return self.kind in data.ORDINARY

    @property
    def has_gradients(self) -> bool:
        """Whether gradients are promised: a NaN that the mask hides, or does not, may spread in them."""
        return self.spec.grad and self.kind not in data.FORWARD_ONLY

    def operands(self) -> Operands | DecodeOperands:
        """The inputs, on the spec's device. The same line gives the same numbers on every device."""
        draw = data.Draw(self.seed)
        spec = self.spec
        if spec.op == "decode":
            return self._decode(draw)
        B, tokens_q, tokens_k = self.B, self.L, self.S
        x_packed: dict[str, Tensor | int | None] = {}
        if spec.op == "varlen":
            cu_q, cu_k = draw.cumulative(B, self.L), draw.cumulative(B, self.S)
            tokens_q, tokens_k = int(cu_q[-1]) + self.seed % 2, int(cu_k[-1]) + self.seed % 3
            x_packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": self.L, "max_seqlen_k": self.S}
        rows = 1 if x_packed else B
        x = Operands(
            draw.normal(rows, self.Hq, tokens_q, spec.head_dim),
            draw.normal(rows, self.Hkv, tokens_k, spec.head_dim),
            draw.normal(rows, self.Hkv, tokens_k, spec.value_dim),
            bias=draw.normal(*draw.broadcast(B, self.Hq, self.L, self.S, self.kind)) if spec.bias else None,
            keep=draw.coin(*draw.broadcast(B, self.Hq, self.L, self.S, self.kind)) if spec.keep else None,
            alibi_slopes=draw.uniform(B, self.Hq) if spec.alibi else None,
            key_lengths=draw.integers(B, 0, self.S) if spec.key_lengths else None,
            query_lengths=draw.integers(B, 0, self.L) if spec.query_lengths else None,
            ids_q=draw.documents(B, self.L) if spec.documents else None,
            ids_k=draw.documents(B, self.S) if spec.documents else None,
            prefix=draw.integers(B, 0, self.S) if spec.prefix else None,
            rng=draw.seed_pair() if spec.dropout else None,
            left=self.left,
            right=self.right,
            end=spec.band == "end",
            scale=self.factor,
            softcap=self.softcap if spec.softcap else 0.0,
            dropout_p=self.dropout_p if spec.dropout else 0.0,
        )
        x = data.shaped(x._replace(**x_packed), self.kind, draw)  # type: ignore[arg-type]
        x = x._replace(**{n: getattr(x, n).to(spec.dtype) for n in ("q", "k", "v")})
        return data.placed(x, self.layout, torch.device(spec.device))

    def gradients(self, x: Operands) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What comes from above: d_out in out's dtype, d_lse and d_weights where the spec returns them."""
        draw = data.Draw(self.seed + 1)
        B, H, L, _ = x.q.shape
        S, device = x.k.shape[2], x.q.device
        d_out = data.laid_out(draw.normal(B, H, L, x.v.shape[3]).to(device, x.q.dtype), self.layout, 0)
        if self.kind == "past_nan" and x.query_lengths is not None:
            d_out = data.poison_past(d_out, x.query_lengths)
        wide = torch.float64 if x.q.dtype == torch.float64 else torch.float32
        d_lse = draw.normal(B, H, L).to(device, wide) if self.spec.lse else None
        shape = {"": None, "mean": (B, L, S), "heads": (B, H, L, S)}[self.spec.weights]
        return d_out, d_lse, None if shape is None else draw.normal(*shape).to(device, x.q.dtype)

    def _decode(self, draw: data.Draw) -> DecodeOperands:
        spec, S, table = self.spec, self.S, None
        shape: tuple[int, ...] = (self.B, self.Hkv, S)
        if spec.paged:
            block = (1, 4, 16)[self.seed % 3]
            pages = -(-S // block)
            table = draw.permutation(self.B * pages + 2)[: self.B * pages].view(self.B, pages).to(torch.int32)
            shape = (self.B * pages + 2, self.Hkv, block)
        x = DecodeOperands(
            draw.normal(self.B, self.Hq, self.L, spec.head_dim).to(spec.dtype),
            draw.normal(*shape, spec.head_dim).to(spec.dtype),
            draw.normal(*shape, spec.value_dim).to(spec.dtype),
            lengths=draw.integers(self.B, 0, S),
            block_table=table,
            alibi_slopes=draw.uniform(self.B, self.Hq) if spec.alibi else None,
            left=self.left,
            scale=self.factor,
            softcap=self.softcap if spec.softcap else 0.0,
        )
        if self.kind == "past_nan" and table is None:
            k, v = (data.poison_past(cache, x.lengths) for cache in (x.k_cache, x.v_cache))
            x = x._replace(k_cache=k, v_cache=v)
        return data.placed(x, self.layout, torch.device(spec.device))


_SIZES = ("B", "Hq", "Hkv", "L", "S", "seed")


def cases(
    n: int,
    seed: int,
    *,
    ops: tuple[str, ...] = ("attention",),
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16),
    device: str = "cpu",
    sizes: tuple[int, ...] = SIZES,
    head_dims: tuple[int, ...] = HEAD_DIMS,
) -> list[Case]:
    """`n` random cases from one seed. Feature values that were drawn less often so far are drawn more often.

    `sizes` are the lengths to draw from: give tile boundaries (t - 1, t, t + 1) for a kernel with tiles of t.
    """
    roulette = _Roulette(seed)
    made = []
    for i in range(n):
        case = _random_case(roulette, ops, dtypes, device, sizes, head_dims)
        made.append(dataclasses.replace(case, seed=seed * 100_003 + i))
    return made


class _Roulette:
    """Draws values with weight 1 / (1 + uses), per name."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.uses: dict[tuple[str, object], int] = {}

    def pick(self, name: str, values: tuple[object, ...], weights: tuple[float, ...] | None = None) -> object:
        rare = [1 / (1 + self.uses.get((name, v), 0)) for v in values]
        weight = rare if weights is None else [r * w for r, w in zip(rare, weights, strict=True)]
        value = self.random.choices(values, weight)[0]
        self.uses[name, value] = self.uses.get((name, value), 0) + 1
        return value

    def flip(self, p: float) -> bool:
        return self.random.random() < p


def _random_case(
    r: _Roulette,
    ops: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...],
    device: str,
    sizes: tuple[int, ...],
    head_dims: tuple[int, ...],
) -> Case:
    op = str(r.pick("op", ops))
    padded = op == "attention"
    heads, group = r.random.choice((1, 2, 3)), int(str(r.pick("group", (1, 1, 2, 3, 7))))
    D = int(str(r.pick("head_dim", head_dims)))
    L = int(str(r.pick("L", sizes))) if op != "decode" else r.random.choice((1, 1, 2, 5))
    S = int(str(r.pick("S", sizes)))
    if r.flip(0.3) and op != "decode":
        S = L
    band = str(r.pick("band", ("", "start", "end"))) if op != "decode" else "end"
    left, right = _sides(r, band, L, S) if op != "decode" else (r.random.choice((UNBOUNDED, 3)), UNBOUNDED)
    prefix = bool(band) and op != "decode" and r.flip(0.25)
    bias = padded and r.flip(0.3)
    spec = AttentionSpec(
        op=op,
        device=device,
        dtype=r.pick("dtype", dtypes),  # type: ignore[arg-type]
        head_dim=D,
        value_dim=D if r.flip(0.7) else int(str(r.pick("value_dim", head_dims))),
        grouped=group > 1,
        band=band,
        causal=(left == UNBOUNDED and right == 0 and not prefix) if op != "decode" else left == UNBOUNDED,
        prefix=prefix,
        key_lengths=(padded and r.flip(0.35)) or op == "decode",
        query_lengths=padded and r.flip(0.2),
        documents=padded and r.flip(0.2),
        keep=padded and r.flip(0.25),
        bias=bias,
        bias_grad=bias and r.flip(0.6),
        alibi=r.flip(0.2),
        softcap=r.flip(0.2),
        scale_positive=not r.flip(0.06),
        dropout=op != "decode" and r.flip(0.25),
        paged=op == "decode" and r.flip(0.5),
        lse=op == "decode" or r.flip(0.3),
        weights=str(r.pick("weights", ("", "mean", "heads"), (6, 1, 1))) if padded else "",
        grad=op != "decode",
    )
    kinds = tuple(kind for kind in data.KINDS if data.fits(kind, spec))
    kind = str(r.pick("kind", kinds))
    layouts = data.LAYOUTS[:-1] if kind in data.PER_BATCH else data.LAYOUTS
    return Case(
        spec,
        B=r.random.choice((1, 2, 3)),
        Hq=heads * group,
        Hkv=heads,
        L=L,
        S=S,
        left=left,
        right=right,
        scale=-0.25 if not spec.scale_positive and r.flip(0.5) else 0.0,
        layout=str(r.pick("layout", layouts)),
        kind=kind,
    )


def _sides(r: _Roulette, band: str, L: int, S: int) -> tuple[int, int]:
    if not band:
        return UNBOUNDED, UNBOUNDED
    side = r.random.choice((0, 1, 3, max(L, S) // 2))
    return r.random.choice(((UNBOUNDED, 0), (UNBOUNDED, 0), (side, 0), (side, side + 1), (side, UNBOUNDED)))
