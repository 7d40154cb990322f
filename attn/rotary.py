"""Rotary position embedding (Su et al., "RoFormer", 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Turns pairs of features of a query or key by angles that grow with its position.

    Pair n of a row at position p is turned by p * base ** (-2n / dim), so that the dot product of a query and a key
    depends on the distance between them alone.

    Args:
        dim: how many leading features of each head are turned; even, the others pass unchanged.
        base: the longest period is about 2 * pi * base positions.
        interleaved: pairs are (0, 1), (2, 3), ... (RoFormer); else (0, dim/2), (1, dim/2 + 1), ... (GPT-NeoX).

    Raises ValueError for a dim that is odd or < 2 and a base <= 0, TypeError for a dim that is no int.
    """

    dim: int
    base: float = 10000.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.dim, bool) or not isinstance(self.dim, int):
            raise TypeError(f"Rotary: dim is {self.dim!r}; give an even int >= 2")
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"Rotary: dim is {self.dim}; give an even int >= 2")
        if not self.base > 0:
            raise ValueError(f"Rotary: base is {self.base}; it must be > 0")

    def angles(self, positions: Tensor) -> Tensor:
        """(..., dim / 2) angles of integer positions (...), float64 where the device has it."""
        dtype = torch.float32 if positions.device.type == "mps" else torch.float64
        pairs = torch.arange(0, self.dim, 2, device=positions.device, dtype=dtype)
        return positions.to(dtype)[..., None] * self.base ** (-pairs / self.dim)

    def __call__(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Turn x (B, H, L, D).

        Args:
            x: queries or keys, floating, D >= dim.
            positions: integer (L,) or (B, L); None means 0 .. L - 1.

        Returns:
            (B, H, L, D) in x's dtype, turned in float32 (float64 for float64).

        Raises ValueError where D < dim or the positions do not fit.
        """
        B, _, L, D = x.shape
        if self.dim > D:
            raise ValueError(f"Rotary: x has {D} features per head; dim={self.dim} needs at least that many")
        if positions is None:
            positions = torch.arange(L, device=x.device)
        elif tuple(positions.shape) not in ((L,), (B, L)):
            raise ValueError(f"Rotary: positions has shape {tuple(positions.shape)}; it must be ({L},) or ({B}, {L})")
        wide = torch.promote_types(x.dtype, torch.float32)
        angles = self.angles(positions)
        angles = angles[:, None] if angles.dim() == 3 else angles  # (B or none, 1, L, dim / 2)
        cos, sin = angles.cos().to(wide), angles.sin().to(wide)
        turned = x[..., : self.dim].to(wide)
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
        else:
            a, b = turned.chunk(2, -1)
            turned = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
        turned = turned.to(x.dtype)
        return turned if self.dim == D else torch.cat((turned, x[..., self.dim :]), -1)
