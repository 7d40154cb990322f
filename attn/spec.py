"""What a call is, as two values.

`AttentionSpec` says what kind of call it is: static, hashable, one line to print and to parse back. It is the
planner's key, the kernels' configuration key and the first half of every case line. `Operands` carries the
tensors and the per-call numbers in the order of the op schemas. Neither holds anything symbolic in a static
field.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

UNBOUNDED = -1
"""A window side without limit, as an op argument (a real side is >= 0)."""


class Operands(NamedTuple):
    """Tensors and per-call numbers of one call. B batch, Hq/Hkv heads, L queries, S keys, D/Dv head dims.

    In a packed (varlen) call B is 1, L and S count all tokens, N is the number of sequences, and everything
    that speaks of a batch index or a position means the sequence and the position inside it.
    """

    q: Tensor  # (B, Hq, L, D), any strides
    k: Tensor  # (B, Hkv, S, D)
    v: Tensor  # (B, Hkv, S, Dv)
    bias: Tensor | None = None  # float, 4-D, every dim 1 or that of (B, Hq, L, S); added to the scaled scores
    keep: Tensor | None = None  # bool, 4-D, likewise; True = visible
    alibi_slopes: Tensor | None = None  # (B, Hq) float32; packed: (N, Hq)
    key_lengths: Tensor | None = None  # (B,) int32
    query_lengths: Tensor | None = None  # (B,) int32
    ids_q: Tensor | None = None  # (B, L) int64 document ids
    ids_k: Tensor | None = None  # (B, S) int64
    prefix: Tensor | None = None  # (B,) int32: keys below it are visible whatever the band says
    cu_seqlens_q: Tensor | None = None  # (N + 1,) int32; both or neither
    cu_seqlens_k: Tensor | None = None
    rng: Tensor | None = None  # (2,) int64: seed, offset; present iff dropout_p > 0
    left: int = UNBOUNDED  # band: i + off - left <= j
    right: int = UNBOUNDED  # band: j <= i + off + right
    end: bool = False  # band and ALiBi anchor: off = S - L instead of 0
    max_seqlen_q: int = 0  # packed only: an upper bound of the sequence lengths
    max_seqlen_k: int = 0
    scale: float = 1.0
    softcap: float = 0.0  # 0 = none
    dropout_p: float = 0.0

    @property
    def hides(self) -> bool:
        """Whether a mask may hide a score (a bias of -inf is no mask)."""
        parts = (self.key_lengths, self.query_lengths, self.ids_q, self.keep)
        return self.has_band or any(part is not None for part in parts)

    @property
    def has_band(self) -> bool:
        """Whether a side of the band is bounded."""
        return self.left != UNBOUNDED or self.right != UNBOUNDED


class DecodeOperands(NamedTuple):
    """One decoding step: Lq new queries per sequence against a cache. No gradients."""

    q: Tensor  # (B, Hq, Lq, D)
    k_cache: Tensor  # (B, Hkv, S_max, D), or (blocks, Hkv, block_size, D) with a block table
    v_cache: Tensor  # likewise, Dv
    lengths: Tensor  # (B,) int32: valid keys, the new ones included
    block_table: Tensor | None = None  # (B, n) int32
    alibi_slopes: Tensor | None = None  # (B, Hq) float32
    left: int = UNBOUNDED
    right: int = 0
    scale: float = 1.0
    softcap: float = 0.0


class AttentionSpec(NamedTuple):
    """The static description of a call: everything that a backend may look at before it says yes or no.

    >>> spec = AttentionSpec(head_dim=64, value_dim=64, band="start", grad=True)
    >>> str(spec)
    'attention cpu float32 head_dim=64 value_dim=64 band=start grad'
    >>> AttentionSpec.parse(str(spec)) == spec
    True
    """

    op: str = "attention"  # "attention", "varlen" or "decode"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    arch: str = ""  # "sm_90", "gfx942"; "" off the GPU
    head_dim: int = 0
    value_dim: int = 0
    grouped: bool = False  # Hkv < Hq
    band: str = ""  # "", "start" or "end": the anchor
    causal: bool = False  # the band is exactly left unbounded, right 0, without a prefix
    prefix: bool = False
    key_lengths: bool = False
    query_lengths: bool = False
    documents: bool = False
    keep: bool = False  # a dense bool mask
    bias: bool = False  # a bias or a dense float mask
    bias_grad: bool = False
    alibi: bool = False
    softcap: bool = False
    scale_positive: bool = True
    dropout: bool = False
    paged: bool = False
    lse: bool = False
    weights: str = ""  # "", "mean" (over heads) or "heads"
    grad: bool = False
    deterministic: bool = False

    @property
    def sm(self) -> int | None:
        """The compute capability of an NVIDIA GPU, 90 for 9.0; None elsewhere."""
        return int(self.arch.removeprefix("sm_")) if self.arch.startswith("sm_") else None

    def __str__(self) -> str:
        words = [self.op, self.device, str(self.dtype).removeprefix("torch.")]
        for name in self._fields[3:]:
            value = getattr(self, name)
            if value != _DEFAULTS[name]:
                words.append(name if value is True else f"{name}={int(value) if value is False else value}")
        return " ".join(words)

    @classmethod
    def parse(cls, line: str) -> AttentionSpec:
        """Read back what `str(spec)` printed. Raises ValueError naming the word that is not understood."""
        words = line.split()
        if len(words) < 3:
            raise ValueError(f"spec line: {line!r} is too short (example: 'attention cpu float32 head_dim=64')")
        op, device, dtype, *rest = words
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype):
            raise ValueError(f"spec line: {dtype!r} is no dtype (example: 'attention cpu float32 head_dim=64')")
        return cls(op, device, kind, **dict(map(_field, rest)))  # type: ignore[arg-type]


def _field(word: str) -> tuple[str, object]:
    """A word of a spec line, "name" or "name=value", as the field's name and value."""
    name, given, value = word.partition("=")
    if name not in _DEFAULTS:
        raise ValueError(f"spec line: unknown field {word!r}; known: {', '.join(AttentionSpec._fields[3:])}")
    default = _DEFAULTS[name]
    if isinstance(default, str):
        return name, value
    if isinstance(default, bool) and not given:
        return name, True
    if not value.isdecimal():
        raise ValueError(f"spec line: {word!r} needs a number")
    return name, bool(int(value)) if isinstance(default, bool) else int(value)


_DEFAULTS: dict[str, object] = dict(AttentionSpec._field_defaults)


@functools.cache
def arch_of(device_type: str, index: int | None) -> str:
    """The architecture of a GPU ("sm_90", "gfx942"), or "" off the GPU."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return ""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
