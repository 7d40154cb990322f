"""Backward of the compiled CPU kernels where it does more than a random small case reaches: long calls in chunks."""

from __future__ import annotations

import pytest
import torch

from attn import native
from attn.backends import load
from attn.spec import Operands
from attn.testing import assert_gradients, oracle

pytestmark = pytest.mark.skipif(load("cpu").available() is not None, reason="the compiled library is not here")

# Rows enough for several chunks of queries per key head: their sums of dk and dv are added in a second step.
LONG = {
    "causal, one key head": {"B": 1, "Hq": 2, "Hkv": 1, "L": 2500, "S": 1200, "right": 0, "end": True},
    "one head, full": {"B": 1, "Hq": 1, "Hkv": 1, "L": 2100, "S": 700},
    "window, two batches": {"B": 2, "Hq": 4, "Hkv": 2, "L": 1100, "S": 300, "left": 90, "right": 20},
}


def long_call(B: int, Hq: int, Hkv: int, L: int, S: int, **band: int) -> tuple[Operands, torch.Tensor]:
    """A call whose projection is packed as a module's is, with a bias over the keys of each head, and d_out."""
    q, d_out = torch.randn(2, B, L, Hq, 24).transpose(2, 3)
    k, v = torch.randn(B, S, Hkv, 2, 24).permute(3, 0, 2, 1, 4)
    return Operands(q, k, v, bias=torch.randn(1, Hq, 1, S), scale=24**-0.5, **band), d_out  # type: ignore[arg-type]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("isa", native.usable())
@pytest.mark.parametrize("name", LONG)
def test_chunks_of_a_long_call(name: str, isa: str) -> None:
    """Right, and the same bits for 1, 2 and more threads than cores."""
    x, d_out = long_call(**LONG[name])
    engine = load("cpu")
    with native.use_isa(isa):
        residuals = engine.forward(x)
        found = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(engine.backward(x, residuals, d_out, None, None, True))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))  # type: ignore[arg-type]
    assert_gradients(oracle(x, (d_out, None, None)), *found[0], gate=True)


def test_chunks_of_a_packed_call() -> None:
    """Sequences of unlike length, and rows behind the last one, whose gradients are 0."""
    q, d_out = torch.randn(2, 1, 2, 2400, 16)
    k, v = torch.randn(2, 1, 1, 1500, 16)
    ends_q, ends_k = torch.tensor([0, 30, 2330], dtype=torch.int32), torch.tensor([0, 500, 1450], dtype=torch.int32)
    x = Operands(q, k, v, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k, right=0, end=True, scale=0.25)
    x = x._replace(max_seqlen_q=2300, max_seqlen_k=950)
    engine = load("cpu")
    dq, dk, dv, _ = engine.backward(x, engine.forward(x), d_out, None, None, False)
    assert not dq[:, :, 2330:].any()
    assert not dk[:, :, 1450:].any()
    assert not dv[:, :, 1450:].any()
    assert_gradients(oracle(x, (d_out, None, None)), dq, dk, dv, gate=True)
