"""What a layer is made of, as one value."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attn import masks
from attn.rotary import Rotary

ACTIVATIONS = ("relu", "gelu", "swiglu")
NORMS = ("layer", "batch", "rms")


@dataclass(frozen=True)
class LayerConfig:
    """The sizes and choices of an encoder or decoder layer; the defaults are those of `nn.TransformerEncoderLayer`.

    Args:
        d_model: features of a token.
        nhead: attention heads, a divisor of d_model.
        dim_feedforward: features inside the feed-forward network.
        dropout: probability, in attention, feed-forward network and residuals.
        activation: "relu", "gelu" or "swiglu" (Shazeer, 2020: a third matrix, whose SiLU gates the first).
        norm: "layer", "batch" (over all tokens of a batch) or "rms".
        norm_first: norms before attention and feed-forward network instead of after the residual.
        norm_eps: added to variances.
        bias: biases in matrices and norms.
        batch_first: tensors are (N, L, d_model); else (L, N, d_model).
        causal: a token sees the tokens up to itself, without a mask that says so.
        window: how many tokens to its left a token sees (to both sides where it is not causal); None for all.
        num_kv_heads: key and value heads, a divisor of nhead.
        rotary: turns queries and keys of self-attention.

    Raises:
        ValueError: a size < 1, an unknown activation or norm, a dropout outside [0, 1], ...
        TypeError: a size that is no int.
    """

    d_model: int
    nhead: int
    dim_feedforward: int = 2048
    dropout: float = 0.1
    activation: str = "relu"
    norm: str = "layer"
    norm_first: bool = False
    norm_eps: float = 1e-5
    bias: bool = True
    batch_first: bool = True
    causal: bool = False
    window: int | None = None
    num_kv_heads: int | None = None
    rotary: Rotary | None = None

    def __post_init__(self) -> None:
        for name in ("d_model", "nhead", "dim_feedforward"):
            positive(name, getattr(self, name))
        if self.d_model % self.nhead:
            raise ValueError(f"nhead is {self.nhead}; it must divide d_model={self.d_model}")
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("norm", self.norm, NORMS)
        if not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1]")
        if not 0.0 < self.norm_eps < math.inf:
            raise ValueError(f"norm_eps is {self.norm_eps}; it must be > 0")
        if self.window is not None:
            masks.window(self.window, 0)

    @property
    def band(self) -> tuple[int | None, int | None] | None:
        """(left, right) of self-attention, as `attn.MultiheadAttention` takes it."""
        if self.causal:
            return (self.window, 0)
        return None if self.window is None else (self.window, self.window)

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.d_model // self.nhead


def positive(name: str, value: object) -> int:
    """`value`, if it is an int >= 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; give an int >= 1")
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be >= 1")
    return value


def one_of(name: str, value: object, names: tuple[str, ...]) -> None:
    """Raise ValueError for a value that is not among the names."""
    if value not in names:
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(map(repr, names))}")
