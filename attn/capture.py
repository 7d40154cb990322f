"""`capture_weights`: the attention weights of a model's modules while it runs as usual."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from attn.module import MultiheadAttention


class Log:
    """What a module writes its weights to while they are captured."""

    def __init__(self, average: bool) -> None:
        self.average = average
        self.seen: list[Tensor] = []

    def kind(self, wanted: str) -> str:
        """The kind of weights to compute where the caller wants `wanted` ("", "mean" or "heads")."""
        return "mean" if self.average and wanted != "heads" else "heads"

    def take(self, weights: Tensor, wanted: str) -> Tensor | None:
        """Keep the weights, detached, and return what the caller wants of them."""
        shown = weights.detach()
        self.seen.append(shown.mean(1) if self.average and shown.dim() == 4 else shown)
        if not wanted:
            return None
        return weights.mean(1) if wanted == "mean" and weights.dim() == 4 else weights


@contextmanager
def capture_weights(model: nn.Module, *, average: bool = True) -> Iterator[dict[str, list[Tensor]]]:
    """Capture the attention weights of every `attn.MultiheadAttention` in a model.

    The model's results stay the same: callers that ask for no weights still get None. In training the weights are those
    after dropout.

    Args:
        model: a module that holds modules of ours (see `attn.replace`) or is one.
        average: weights averaged over the heads, (N, L, S); else (N, num_heads, L, S).

    Yields:
        {module name: [weights of its first call, of its second, ...]}, detached. A module's name is that in
        `model.named_modules()`, "" for the model itself; modules that were not called have an empty list.

    Raises ValueError where the model holds no module of ours, and warns with the names of PyTorch's own.

    >>> with capture_weights(model) as weights:  # doctest: +SKIP
    ...     model(x)
    >>> weights["layers.0.self_attn"][0].shape  # doctest: +SKIP
    """
    ours = {n: m for n, m in model.named_modules() if isinstance(m, MultiheadAttention)}
    if not ours:
        raise ValueError(
            f"capture_weights: model {type(model).__name__} holds no attn.MultiheadAttention; call attn.replace first"
        )
    theirs = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.MultiheadAttention) and not isinstance(m, MultiheadAttention)
    ]
    if theirs:
        warnings.warn(
            f"capture_weights: not captured, because attn.replace left them as they are: {', '.join(theirs)}",
            stacklevel=3,
        )
    before = {n: m._log for n, m in ours.items()}
    logs = {n: Log(average) for n in ours}
    try:
        for n, m in ours.items():
            m._log = logs[n]
        yield {n: log.seen for n, log in logs.items()}
    finally:
        for n, m in ours.items():
            m._log = before[n]
