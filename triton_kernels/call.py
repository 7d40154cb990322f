"""What a kernel is told about a call: tensors with their strides, masks, numbers, and what is compiled in."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """A (batch, head, row, feature) tensor: pointer and strides; the features of a row are adjacent."""

    ptr: Any
    batch: Any
    head: Any
    row: Any


class Dense(NamedTuple):
    """A (batch, head, row, column) tensor: pointer and strides; stride 0 where it is broadcast."""

    ptr: Any
    batch: Any
    head: Any
    row: Any
    col: Any


class Mask(NamedTuple):
    """The tensors that shape the scores; None where the call has none."""

    key_lengths: Any = None
    query_lengths: Any = None
    cu_q: Any = None
    cu_k: Any = None
    prefix: Any = None
    ids_q: Any = None
    ids_k: Any = None
    keep: Any = None  # Dense
    bias: Any = None  # Dense
    d_weights: Any = None  # Dense: gradient of the returned weights
    slopes: Any = None
    rng: Any = None


class Numbers(NamedTuple):
    """What changes from call to call and is never worth a compiled variant."""

    heads: Any
    group: Any  # query heads per key head
    rows: Any
    keys: Any
    padded: Any  # rows of the statistics of one head
    left: Any
    right: Any
    threshold: Any  # of dropout; passed as two halves of 16 bits
    scale: Any
    cap: Any
    inv_keep: Any  # 1 / (1 - p)
    share: Any  # what one head's probability counts in the returned weights


class Flags(NamedTuple):
    """What a call uses; everything else is compiled out."""

    D: int
    DV: int
    BD: int  # the next power of two
    BDV: int
    BAND: bool = False
    END: bool = False
    PREFIX: bool = False
    KEY_LENGTHS: bool = False
    QUERY_LENGTHS: bool = False
    VARLEN: bool = False
    DOCUMENTS: bool = False
    KEEP: bool = False
    BIAS: bool = False
    ALIBI: bool = False
    SOFTCAP: bool = False
    DROPOUT: bool = False
    D_WEIGHTS: bool = False
    EXACT: bool = False  # float32, or a bias: see `exponent`
    FOLDED: bool = False  # the score is q.k times a positive scale, which the exponent applies
    TMA: bool = False
    ALIGN: int = 1  # what divides all strides, where Triton, which looks for 16 alone, does not see it
    PRECISION: str = "ieee"


def odd(x: Any) -> Any:
    """How integers >= 0 are passed in tuples: Triton compiles a variant for each that is 1 or a multiple of 16."""
    return 2 * x + 3


@triton.jit
def even(x):
    """The inverse of `odd`."""
    return (x - 3) >> 1


@triton.jit
def received(n):
    """The numbers as they were before `odd`."""
    high, low = n.threshold
    threshold = (tl.cast(even(high), tl.uint32) << 16) | tl.cast(even(low), tl.uint32)
    return Numbers(
        heads=even(n.heads),
        group=even(n.group),
        rows=even(n.rows),
        keys=even(n.keys),
        padded=even(n.padded),
        left=even(n.left),
        right=even(n.right),
        threshold=threshold,
        scale=n.scale,
        cap=n.cap,
        inv_keep=n.inv_keep,
        share=n.share,
    )
