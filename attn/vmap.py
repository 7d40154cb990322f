"""vmap rules of the raw ops: fold the mapped dimension into the batch, or loop where it cannot be folded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn.spec import Operands

Rule = Callable[..., tuple[Any, Any]]
_FIELDS = {name: i for i, name in enumerate(Operands._fields)}


def looped(op: Any) -> Rule:
    """A rule that calls the op once per sample."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        samples = []
        for n in range(info.batch_size):
            here = [a if d is None else a.select(d, n) for a, d in zip(args, in_dims, strict=True)]
            samples.append(op(*here))
        stacked = tuple(torch.stack(column) for column in zip(*samples, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def folded(op: Any, lead: int) -> Rule:
    """A rule that runs all samples as one batch. `lead` arguments stand before the operands, each with a batch dim.

    It loops where folding would change the result: packed calls, and dropout with the same bits for every sample. With
    different bits the seed of the first sample serves all, and the folded batch index tells them apart.
    """
    loop = looped(op)

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        at = {name: lead + i for name, i in _FIELDS.items()}
        rng, packed = at["rng"], args[at["cu_seqlens_q"]] is not None
        if packed or (args[rng] is not None and in_dims[rng] is None):
            return loop(info, in_dims, *args)
        V = info.batch_size
        new = list(args)
        for i, (a, d) in enumerate(zip(args, in_dims, strict=True)):
            if isinstance(a, Tensor):
                new[i] = a.movedim(d, 0) if d is not None else a.expand(V, *a.shape)
        B = new[at["q"]].shape[1]
        bias = new[at["bias"]]
        for i, a in enumerate(new):
            if i == rng and a is not None:
                new[i] = a[0]
            elif isinstance(a, Tensor):
                if i in (at["bias"], at["keep"]):
                    a = a.expand(V, B, *a.shape[2:])
                new[i] = a.flatten(0, 1)
        results = [t.unflatten(0, (V, -1)) if t.dim() > 1 else t.expand(V, *t.shape) for t in op(*new)]
        if lead and bias is not None and results[3].dim() == bias.dim():
            results[3] = torch.stack([g.sum_to_size(bias.shape[1:]) for g in results[3]])
        return tuple(results), (0,) * len(results)

    return rule
