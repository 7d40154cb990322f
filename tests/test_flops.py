"""Operations are counted for visible pairs alone, and torch's FlopCounterMode counts them so too."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from bench_works import CALLS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import attn
from attn import flops, masks
from attn.benchmarks import work
from attn.masks import Mask
from attn.spec import Operands


@pytest.mark.parametrize("line", CALLS[:9])
def test_flops_are_those_of_visible_pairs(line: str) -> None:
    w = work.parse(line)
    x = w.operands()
    assert isinstance(x, Operands)
    by_hand = _pairs_by_hand(x)
    D = w.D
    per_pair = {"forward": 4 * D, "backward": 10 * D, "both": 14 * D}[w.what]
    assert work.cost_of_call(w, x).flops == by_hand * per_pair


def _pairs_by_hand(x: Operands) -> int:
    """Counted one by one."""
    B, H, L, _ = x.q.shape
    seen = 0
    for b in range(B):
        for i in range(L):
            for j in range(x.k.shape[2]):
                visible = (x.right < 0 or j <= i + x.right) and (x.left < 0 or j >= i - x.left)
                if x.key_lengths is not None:
                    visible = visible and j < int(x.key_lengths[b])
                if x.ids_q is not None and x.ids_k is not None:
                    visible = visible and int(x.ids_q[b, i]) == int(x.ids_k[b, j])
                if x.keep is not None:
                    visible = visible and bool(x.keep[0, 0, i, j])
                seen += bool(visible)
    return seen * H


def test_flops_of_packed_calls_and_of_decoding() -> None:
    packed = work.parse(CALLS[9])
    x = packed.operands()
    assert isinstance(x, Operands)
    lengths = x.cu_seqlens_q.diff().tolist()  # type: ignore[union-attr]
    assert work.cost_of_call(packed, x).flops == sum(n * (n + 1) // 2 for n in lengths) * packed.H * 14 * packed.D
    step = work.parse(CALLS[11])
    lengths = work.padding_lengths(step).tolist()
    pairs = sum(n + (n - 1) + (n - 2) for n in lengths) * step.H
    assert work.cost_of_call(step, step.operands()).flops == pairs * 4 * step.D


MASKS = [
    None,
    masks.causal(),
    masks.causal("end"),
    masks.window(3, 5),
    masks.window(None, 2, "end"),
    masks.padding(torch.tensor([7, 50])),
    masks.padding(torch.tensor([7, 50]), torch.tensor([37, 5])) & masks.causal("end"),
    masks.prefix_lm(5),
    masks.documents(((torch.arange(37) // 9).expand(2, -1), (torch.arange(50) // 13).expand(2, -1))),
    masks.dense(torch.arange(50) % 3 > 0),
]


@pytest.mark.parametrize("mask", MASKS)
def test_the_counter_sees_a_training_step(mask: Mask | None) -> None:
    q, k = torch.randn(2, 4, 37, 16, requires_grad=True), torch.randn(2, 2, 50, 16, requires_grad=True)
    v = torch.randn(2, 2, 50, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        attn.attention(q, k, v, mask=mask, backend="reference").sum().backward()
    x = attn.functional.checked(q, k, v, mask, None, None, 0.0, None, None)
    seen = masks.visibility(x, 37, 50)
    pairs = 2 * 4 * 37 * 50 if seen is None else int(seen.expand(2, 4, 37, 50).sum())
    assert flops.visible_pairs(x) == pairs
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    forward, backward = pairs * 2 * (16 + 8), pairs * 2 * (3 * 16 + 2 * 8)
    assert counts == {"attn.attention_forward": forward, "attn.attention_backward": backward}


def test_the_counter_sees_decoding() -> None:
    q, cache = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 50, 16)
    with FlopCounterMode(display=False) as counter:
        attn.decode_attention(q, cache, cache, lengths=torch.tensor([50, 9], dtype=torch.int32))
    assert counter.get_total_flops() == 59 * 4 * 4 * 16


def test_where_values_are_not_known_all_pairs_count() -> None:
    with FakeTensorMode() as mode:
        q = torch.randn(2, 4, 37, 16)
        lengths = torch.full((2,), 5, dtype=torch.int32)
    assert mode is not None
    assert flops.visible_pairs(Operands(q, q, q, key_lengths=lengths)) == 2 * 4 * 37 * 37


def test_a_counter_that_is_loaded_later_knows_our_operations() -> None:
    code = (
        "import sys, torch, attn; q = torch.ones(1, 1, 4, 8); attn.attention(q, q, q, backend='reference'); "
        "late = 'torch.utils.flop_counter' not in sys.modules; "
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "with FlopCounterMode(display=False) as c: attn.attention(q, q, q, backend='reference')\n"
        "print(late, c.get_total_flops())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", str(16 * 4 * 8)]
