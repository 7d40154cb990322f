"""From operands to kernel arguments, and the key under which a compiled kernel is found again."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attn.rng import threshold
from attn.spec import UNBOUNDED, Operands, arch_of

from . import config
from .call import Dense, Flags, Mask, Numbers, Rows, odd
from .launch import Entry

FAR = 1 << 29
"""A band side without limit, and the most rows or keys: `odd` ones still fit 32 bits."""

plans: dict[Any, Any] = {}
_MOST_PLANS = 4096
NO_MASK = Mask()
_SHAPERS = slice(Operands._fields.index("bias"), Operands._fields.index("rng") + 1)
_NUMBERS = slice(_SHAPERS.stop, None)


def rows(t: Tensor) -> Tensor:
    """t, or a copy where its features are not adjacent or offsets inside a tile would not fit 32 bits."""
    stride = t.stride()
    return t if stride[3] == 1 and stride[2] < 1 << 23 else t.contiguous()


def view(t: Tensor) -> Rows:
    """t as a kernel argument."""
    stride = t.stride()
    return Rows(t, stride[0], stride[1], stride[2])


def plain(x: Operands) -> bool:
    """Whether no tensor but q, k and v shapes the scores."""
    return all([t is None for t in x[_SHAPERS]])  # noqa: C419 - a list is quicker than a generator


def dense(t: Tensor | None) -> Dense | None:
    """A 4-D tensor with stride 0 where it is broadcast; bools as bytes."""
    if t is None:
        return None
    if t.dtype == torch.bool:
        t = t.view(torch.uint8)
    return Dense(t, *(0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)))


def mask_of(x: Operands, d_weights: Tensor | None) -> Mask:
    """The tensors that shape the scores."""
    if d_weights is None and plain(x):
        return NO_MASK
    return Mask(
        *map(_contiguous, (x.key_lengths, x.query_lengths, x.cu_seqlens_q, x.cu_seqlens_k)),
        *map(_contiguous, (x.prefix, x.ids_q, x.ids_k)),
        keep=dense(x.keep),
        bias=dense(x.bias),
        d_weights=dense(d_weights),
        slopes=_contiguous(x.alibi_slopes),
        rng=x.rng,
    )


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def numbers_of(x: Operands, group: int, keys: int, padded: int = 0, share: float = 1.0) -> Numbers:
    """The numbers of a call; `share` is what a head counts in the returned weights.

    Raises ValueError where rows or keys are more than the kernels count."""
    _, H, L, _ = x.q.shape
    for name, n in (("query", L), ("key", keys)):
        if n > FAR:
            raise ValueError(
                f"{name} has {n} rows; the triton kernels count to {FAR}: split it, or use another backend"
            )
    left = FAR if x.left == UNBOUNDED else min(x.left, FAR)
    right = FAR if x.right == UNBOUNDED else min(x.right, FAR)
    bits, inv_keep = 0, 1.0
    if x.dropout_p:
        bits = threshold(x.dropout_p)
        # All are dropped: one word in 2^32 passes the threshold that fits, and counts 0.
        inv_keep = 0.0 if bits >= 1 << 32 else 1.0 / (1.0 - x.dropout_p)
        bits = min(bits, (1 << 32) - 1)
    halves = (odd(bits >> 16), odd(bits & 0xFFFF))
    sizes = map(odd, (H, group, L, keys, padded, left, right))
    return Numbers(*sizes, halves, x.scale, x.softcap, inv_keep, share)


def key_of(name: str, x: Operands, tensors: tuple[Tensor, ...], *more: Any) -> tuple[Any, ...]:
    """What decides about a call's plan: all that Triton specialises kernels on, all that `Flags` hold, and the numbers.
    Its first item says whether all pointers are 16-byte aligned: kernels of others go through Triton's binder."""
    pointers = 0
    found: list[Any] = [name, x.q.dtype, x.q.device.index, *x[_NUMBERS], *more]
    if x.q.dtype == torch.float32:
        found.append(tf32())
    if not plain(x):
        tensors += x[_SHAPERS]
    for t in tensors:
        if t is None:
            found.append(None)
        else:
            found += t.shape, t.stride(), t.dtype
            pointers |= t.data_ptr()
    return pointers & 15 == 0, *found


def tf32() -> bool:
    """Whether torch multiplies float32 matrices in TF32."""
    wish = torch.backends.cuda.matmul.fp32_precision
    return bool((torch.backends.fp32_precision if wish == "none" else wish) == "tf32")


def math_of(dtype: torch.dtype) -> str:
    """How matrices of this dtype are multiplied: "16", "tf32" or "ieee"."""
    return "16" if dtype.itemsize == 2 else "tf32" if tf32() else "ieee"


def power_of_two(n: int, least: int = 16) -> int:
    """The next power of two; matrix products need 16."""
    return max(least, 1 << (n - 1).bit_length())


def flags_of(x: Operands, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Flags:
    """Everything about a call that its kernels are compiled for; `more` are other tensors that they load rows of."""
    D, DV = q.shape[3], v.shape[3]
    common = math.gcd(D, DV, *(s for t in (q, k, v, *more) for s in t.stride()[:3])) & 15
    exact = q.dtype == torch.float32 or x.bias is not None
    return Flags(
        D,
        DV,
        power_of_two(D),
        power_of_two(DV),
        BAND=x.left != UNBOUNDED or x.right != UNBOUNDED,
        END=x.end,
        PREFIX=x.prefix is not None,
        KEY_LENGTHS=x.key_lengths is not None,
        QUERY_LENGTHS=x.query_lengths is not None,
        VARLEN=x.cu_seqlens_q is not None,
        DOCUMENTS=x.ids_q is not None,
        KEEP=x.keep is not None,
        BIAS=x.bias is not None,
        ALIBI=x.alibi_slopes is not None,
        SOFTCAP=x.softcap > 0,
        DROPOUT=x.rng is not None,
        ALIGN=common & -common or 1,  # its largest power of two; a multiple of 16 needs no help
        EXACT=exact,
        FOLDED=not exact and x.alibi_slopes is None and x.softcap == 0 and x.scale > 0,
        PRECISION="tf32" if math_of(q.dtype) == "tf32" else "ieee",
    )


def remember(key: Any, plan: Any) -> Any:
    """Keep what was found out about a kind of call."""
    if len(plans) >= _MOST_PLANS:
        plans.clear()
    plans[key] = plan
    return plan


class Tiles:
    """The tiles of one kind of call."""

    def __init__(self, flags: Flags, t: Tensor, direct: bool) -> None:
        self.flags, self.direct, self.device = flags, direct, t.device
        self.dim = max(flags.D, flags.DV)
        self.math = math_of(t.dtype)
        self.arch = arch_of(t.device.type, t.device.index)
        dense = flags.KEEP or flags.BIAS or flags.D_WEIGHTS or flags.DOCUMENTS
        heavy = dense or flags.ALIBI or flags.SOFTCAP or flags.DROPOUT
        lengths = (flags.KEY_LENGTHS or flags.QUERY_LENGTHS or flags.VARLEN) and not flags.BAND
        self.load = config.HEAVY if heavy else config.LENGTHS if lengths else config.LIGHT

    def streaming(self, *tensors: Tensor) -> Tiles:
        """For kernels that stream these tensors: by descriptors where the GPU has and the strides allow them. Products
        without tensor cores read the swizzled tiles of descriptors element by element, so they take pointers."""
        if self.math == "ieee" or not (config.descriptors(self.arch) and all(map(_describable, tensors))):
            return self
        return Tiles(self.flags._replace(TMA=True), tensors[0], self.direct)

    def one_pass(self) -> bool:
        """Whether dQ may be added up by atomics in the kernel that makes dK and dV."""
        return config.one_pass(self.arch, self.dim, self.math, self.load)

    def entry(self, name: str, fn: Any, flags: Flags | None = None, **constants: Any) -> tuple[Entry, config.Tile]:
        """The kernel of one pass with its tile."""
        t = config.tile(self.arch, name, self.dim, self.math, self.load)
        return self.with_tile(t, fn, flags or self.flags, **constants), t

    def with_tile(self, t: config.Tile, fn: Any, flags: Flags, **constants: Any) -> Entry:
        """The kernel with a given tile."""
        named = {"F": flags, **constants, "T": t}
        options = {"num_warps": t.warps, "num_stages": t.stages, "enable_fp_fusion": True}
        if t.registers and not self.arch.startswith("gfx"):  # Triton has no such option there
            options["maxnreg"] = t.registers
        return Entry(fn, {n: named[n] for n in fn.arg_names if n in named}, options, self.direct)


def _describable(t: Tensor) -> bool:
    """Whether a tensor descriptor takes t: 16-byte aligned base and strides."""
    return t.data_ptr() % 16 == 0 and all(s * t.element_size() % 16 == 0 for s in t.stride()[:3])


def document_table(ids_x: Tensor | None, ids_y: Tensor | None, bx: int, by: int) -> Tensor | None:
    """For each block of bx: the first y of a block that shares a document, [full_lo, full_hi) where all ids are one,
    and the end; int32 (B, blocks, 4)."""
    if ids_x is None or ids_y is None:
        return None

    def extremes(ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
        pad, far = (0, -ids.shape[1] % n), torch.iinfo(torch.int64).max
        low = torch.nn.functional.pad(ids, pad, value=far).unflatten(1, (-1, n)).amin(-1)
        return low, torch.nn.functional.pad(ids, pad, value=-far).unflatten(1, (-1, n)).amax(-1)

    (x_low, x_high), (y_low, y_high) = extremes(ids_x, bx), extremes(ids_y, by)
    meet = (x_low[:, :, None] <= y_high[:, None]) & (x_high[:, :, None] >= y_low[:, None])
    same = (x_low == x_high)[:, :, None] & (y_low == y_high)[:, None] & (x_low[:, :, None] == y_low[:, None])
    blocks = y_low.shape[1]
    at = torch.arange(blocks, device=ids_x.device)
    hi = torch.where(meet, at + 1, 0).amax(-1)
    lo = torch.minimum(torch.where(meet, at, blocks).amin(-1), hi)
    full_lo = torch.where(same, at, blocks).amin(-1)
    full_hi = torch.where(~same & (at >= full_lo[..., None]), at, blocks).amin(-1)
    return (torch.stack([lo, full_lo, full_hi, hi], -1) * by).to(torch.int32)


def sequences(x: Operands) -> tuple[int, int, int]:
    """(sequences, most rows of one, most keys)."""
    if x.cu_seqlens_q is None:
        return x.q.shape[0], x.q.shape[2], x.k.shape[2]
    return x.cu_seqlens_q.shape[0] - 1, min(x.max_seqlen_q, x.q.shape[2]), min(x.max_seqlen_k, x.k.shape[2])


def ceil(n: int, block: int) -> int:
    """Blocks that cover n."""
    return -(-n // block)
