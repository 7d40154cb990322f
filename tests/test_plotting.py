"""`attn.plot_weights`: the weights that it is given, under the names of their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attn
from attn.testing import assert_close

matplotlib = pytest.importorskip("matplotlib", reason="pip install matplotlib runs these tests")

Q, K = ["das", "ist", "gut"], ["this", "is", "good", "."]


def panels(figure: Any) -> list[Tensor]:
    return [torch.tensor(a.images[0].get_array().data) for a in figure.axes if a.images]


def names(figure: Any) -> tuple[list[str], list[str]]:
    first = figure.axes[0]
    return [t.get_text() for t in first.get_yticklabels()], [t.get_text() for t in first.get_xticklabels()]


def test_one_map(tmp_path: Path) -> None:
    weights = torch.rand(3, 4).softmax(-1)
    figure = attn.plot_weights(weights, Q, K, title="German to English")
    assert_close(panels(figure)[0], weights)
    assert names(figure) == (Q, K)
    figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000


def test_what_was_captured() -> None:
    module = attn.MultiheadAttention(12, 6, batch_first=True)
    x, memory = torch.randn(2, 3, 12), torch.randn(2, 4, 12)
    for average, count in ((True, 1), (False, 6)):
        with attn.capture_weights(module, average=average) as captured:
            module(x + 1, memory, memory)
            module(x, memory, memory)
        figure = attn.plot_weights(captured[""], Q, K, index=1)
        shown = panels(figure)
        assert len(shown) == count
        expected = module(x, memory, memory, average_attn_weights=average)[1][1]
        for n, panel in enumerate(shown):
            assert_close(panel, expected if average else expected[n])


def test_paddings_are_left_out_and_keys_may_be_the_queries() -> None:
    weights = torch.rand(1, 5, 5)
    figure = attn.plot_weights(weights, Q)
    assert_close(panels(figure)[0], weights[0, :3, :3])
    assert names(figure) == (Q, Q)


@pytest.mark.parametrize(
    ("weights", "tokens", "options", "error", "words"),
    [
        ("abc", Q, {}, TypeError, "weights is str"),
        ([], Q, {}, ValueError, "weights is empty: the module was not called"),
        (torch.rand(4), Q, {}, ValueError, r"weights has shape \(4,\)"),
        (torch.rand(2, 3, 4), Q, {"index": 2}, ValueError, "index is 2; weights holds 2 sequences"),
        (torch.rand(2, 4), Q, {}, ValueError, "tokens_q has 3 names; weights has 2"),
        (torch.rand(3, 3), [], {}, ValueError, "tokens_q has 0 names"),
        (torch.rand(3, 3), "abc", {}, TypeError, "tokens_q must be a list of strings"),
        (torch.rand(3, 3), Q, {"tokens_k": [1, 2, 3]}, TypeError, "tokens_k must be a list of strings"),
    ],
)
def test_what_cannot_be_drawn(weights: Any, tokens: Any, options: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        attn.plot_weights(weights, tokens, **options)
