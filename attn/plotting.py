"""`plot_weights`: attention weights as a heat map that a person can read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL = 3.2
"""The least side of a panel, in inches."""
_CELL = 0.32
"""What a token takes, in inches."""
_COLUMNS = 4


def plot_weights(
    weights: Tensor | Sequence[Tensor],
    tokens_q: Sequence[str],
    tokens_k: Sequence[str] | None = None,
    *,
    index: int = 0,
    title: str | None = None,
) -> Figure:
    """Draw attention weights: a row per query, a column per key, darker where more of the weight lies.

    Args:
        weights: (L, S), (N, L, S), or (N, num_heads, L, S), which gives a panel per head; or the list that
            `capture_weights` keeps per module, of which the last call is drawn.
        tokens_q: a name per query, of which there may be fewer than L: the paddings after them are left out.
        tokens_k: a name per key; None means those of the queries.
        index: which sequence of a batch.
        title: above all.

    Returns:
        The figure; its `savefig(path)` writes it.

    Raises:
        TypeError: weights or names of the wrong kind.
        ValueError: weights of a call that was not made, of another number of dims, with fewer rows or columns than
            there are names, or an index outside the batch.
        ImportError: without matplotlib.
    """
    maps = _maps(weights, index)
    tokens_k = tokens_q if tokens_k is None else tokens_k
    for name, tokens, have in (("tokens_q", tokens_q, maps.shape[1]), ("tokens_k", tokens_k, maps.shape[2])):
        _check_tokens(name, tokens, have)
    shown = maps[:, : len(tokens_q), : len(tokens_k)].float().cpu().numpy()
    figure, panels = _panels(len(shown), len(tokens_q), len(tokens_k))
    top = max(float(shown.max()), 1e-6)
    image: Any = None
    for n, (axes, panel) in enumerate(zip(panels, shown, strict=True)):
        image = axes.imshow(panel, cmap="Blues", vmin=0.0, vmax=top, aspect="equal")
        axes.set_xticks(range(len(tokens_k)), list(tokens_k), rotation=90)
        axes.set_yticks(range(len(tokens_q)), list(tokens_q))
        axes.tick_params(length=0)
        if len(shown) > 1:
            axes.set_title(f"head {n}", fontsize=10)
    figure.supxlabel("keys", fontsize=10)
    figure.supylabel("queries", fontsize=10)
    figure.colorbar(image, ax=panels, shrink=0.8, label="attention weight")
    if title is not None:
        figure.suptitle(title)
    return figure


def _maps(weights: Tensor | Sequence[Tensor], index: int) -> Tensor:
    """(panels, L, S) of one sequence."""
    if not isinstance(weights, Tensor):
        if not isinstance(weights, (list, tuple)) or not all(isinstance(w, Tensor) for w in weights):
            raise TypeError(f"weights is {type(weights).__name__}; give a tensor, or a list that capture_weights keeps")
        if not weights:
            raise ValueError("weights is empty: the module was not called inside of capture_weights")
    t = (weights if isinstance(weights, Tensor) else weights[-1]).detach()
    if t.dim() == 2:
        return t[None]
    if t.dim() not in (3, 4):
        raise ValueError(f"weights has shape {tuple(t.shape)}; it must be (L, S), (N, L, S) or (N, num_heads, L, S)")
    if not -t.shape[0] <= index < t.shape[0]:
        raise ValueError(f"index is {index}; weights holds {t.shape[0]} sequences")
    return t[index][None] if t.dim() == 3 else t[index]


def _check_tokens(name: str, tokens: Sequence[str], have: int) -> None:
    if isinstance(tokens, str) or not all(isinstance(t, str) for t in tokens):
        raise TypeError(f"{name} must be a list of strings, one per token")
    if not 1 <= len(tokens) <= have:
        raise ValueError(f"{name} has {len(tokens)} names; weights has {have} in that dim")


def _panels(count: int, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_weights needs matplotlib: pip install matplotlib") from error
    across = min(count, _COLUMNS)
    down = -(-count // across)
    size = (across * max(_PANEL, _CELL * columns) + 1.6, down * max(_PANEL, _CELL * rows) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    for spare in grid.flat[count:]:
        spare.set_axis_off()
    return figure, list(grid.flat[:count])
