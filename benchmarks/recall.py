"""A task of memory: n pairs of a key and a value are shown, then each key alone in another order; what was its value?

A recurrent net has to carry all pairs in a state of fixed size, attention looks them up. Every net has one layer, the
same width, and the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attn

KEYS, VALUES, WIDTH, BATCH = 32, 16, 64, 32
PAIRS = (2, 4, 8, 16, 32)
"""How many are shown; a sequence is twice as long."""
STEPS, RATE, ASKED = 3000, 3e-3, 256
"""Steps of training, its highest rate, and sequences that are asked for each number of pairs."""


class Last(nn.Module):
    """A net of PyTorch's `nn.LSTM` kind, without its state."""

    def __init__(self, net: nn.LSTM) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, E) to (B, L, E)."""
        out: Tensor = self.net(x)[0]
        return out


class SelfAttention(nn.Module):
    """`attn.MultiheadAttention` of a sequence to itself, causal or not."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.net = attn.MultiheadAttention(width, heads, batch_first=True, window=(None, 0) if causal else None)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, E) to (B, L, E)."""
        out: Tensor = self.net(x, x, x, need_weights=False)[0]
        return out


NETS: dict[str, Callable[[int, int], nn.Module]] = {
    "LSTM": lambda width, heads: Last(nn.LSTM(width, width, batch_first=True)),
    "bidirectional LSTM": lambda width, heads: Last(nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)),
    "attention, causal": lambda width, heads: SelfAttention(width, heads, causal=True),
    "attention, full": lambda width, heads: SelfAttention(width, heads, causal=False),
}
"""Name -> net of a width and a number of heads: those that see the past, and those that see all, in turn."""


class Recaller(nn.Module):
    """Keys and values in, scores of the value of each key out."""

    def __init__(self, net: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.key, self.value = nn.Embedding(KEYS, width), nn.Embedding(VALUES + 1, width)
        self.norm, self.net, self.head = nn.LayerNorm(width), net, nn.Linear(width, VALUES)

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        """Scores (B, L, VALUES) of keys and values (B, L); the value VALUES asks."""
        scores: Tensor = self.head(self.net(self.norm(self.key(keys) + self.value(values))))
        return scores


def sequences(count: int, pairs: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (count, 2 pairs), the second half of which ask, and the answers to those."""
    keys = torch.rand(count, KEYS, generator=draw).argsort(1)[:, :pairs]
    values = torch.randint(VALUES, (count, pairs), generator=draw)
    order = torch.rand(count, pairs, generator=draw).argsort(1)
    asked = torch.full_like(values, VALUES)
    return torch.cat([keys, keys.gather(1, order)], 1), torch.cat([values, asked], 1), values.gather(1, order)


def learned(name: str, steps: int = STEPS, seed: int = 0) -> dict[str, Any]:
    """Train one of `NETS` on all numbers of pairs, and ask it."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    model = Recaller(NETS[name](WIDTH, 4))
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    for step in range(steps):
        keys, values, answers = sequences(BATCH, PAIRS[step % len(PAIRS)], draw)
        done = (step + 1) / steps
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(20 * done, 0.5 + 0.5 * math.cos(math.pi * done))
        loss = F.cross_entropy(model(keys, values)[:, answers.shape[1] :].flatten(0, 1), answers.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    parameters = sum(p.numel() for p in model.net.parameters())
    return {"net": name, "parameters": parameters, "steps": steps} | _answers(model.eval())


def _answers(model: Recaller) -> dict[str, Any]:
    """The share of right answers by number of pairs."""
    draw = torch.Generator().manual_seed(1)
    shares = []
    for pairs in PAIRS:
        keys, values, answers = sequences(ASKED, pairs, draw)
        with torch.no_grad():
            right = model(keys, values)[:, pairs:].argmax(-1) == answers
        shares.append(round(float(right.float().mean()), 4))
    return {"values": VALUES, "pairs": list(PAIRS), "right": shares}
