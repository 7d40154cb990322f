"""The reference on packed sequences and on caches: each is the dense definition in another layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_calls import DOUBLE, SEED, call
from torch import Tensor

from attn import reference
from attn.spec import DecodeOperands, Operands
from attn.testing import assert_close


def packed(lengths_q: list[int], lengths_k: list[int], rest: int = 0, **more: Any) -> Operands:
    cu = [torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in (lengths_q, lengths_k)]
    return call(
        B=1, L=sum(lengths_q) + rest, S=sum(lengths_k) + rest, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1], **more
    )  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"right": 0},
        {"right": 0, "end": True, "alibi_slopes": torch.rand(4, 4)},
        {"left": 1, "right": 0, "prefix": torch.tensor([1, 0, 2, 3], dtype=torch.int32)},
        {"rng": SEED, "dropout_p": 0.4, "softcap": 1.5},
    ],
)
def test_packed_is_padded(more: dict[str, Any]) -> None:
    """Each sequence alone, forward and backward; bits of the dropout by sequence number and local position."""
    lengths_q, lengths_k = [3, 0, 4, 2], [5, 2, 0, 3]
    x = packed(lengths_q, lengths_k, rest=2, **more)
    B, L, S = 4, max(lengths_q), max(lengths_k)

    def padded(t: Tensor, lengths: list[int], longest: int) -> Tensor:
        full = t.new_full((B, t.shape[1], longest, t.shape[3]), torch.nan)
        for b, part in enumerate(t[0, :, : sum(lengths)].split(lengths, 1)):
            full[b, :, : lengths[b]] = part
        return full

    def unpadded(t: Tensor, lengths: list[int]) -> Tensor:
        return torch.cat([t[b, :, :n] for b, n in enumerate(lengths)], 1)[None]

    tall = x._replace(
        q=padded(x.q, lengths_q, L), k=padded(x.k, lengths_k, S), v=padded(x.v, lengths_k, S),
        key_lengths=torch.tensor(lengths_k), query_lengths=torch.tensor(lengths_q),
        cu_seqlens_q=None, cu_seqlens_k=None,
    )  # fmt: skip
    residuals, want = reference.forward(x), reference.forward(tall)
    used = sum(lengths_q)
    for found, expected in zip(residuals, want, strict=True):
        assert_close(found[:, :, :used], unpadded(expected, lengths_q))
    assert not residuals[0][:, :, used:].any()
    assert (residuals[1][:, :, used:] == -torch.inf).all()
    d_out, d_lse = torch.randn_like(residuals[0]), torch.randn_like(residuals[1])
    grads = reference.backward(x, residuals, d_out, d_lse)
    wide = reference.backward(
        tall, want, padded(d_out, lengths_q, L), padded(d_lse[..., None], lengths_q, L)[..., 0]
    )  # fmt: skip
    for found, expected, lengths in zip(grads[:3], wide[:3], (lengths_q, lengths_k, lengths_k), strict=True):
        assert_close(found[:, :, : sum(lengths)], unpadded(expected, lengths))  # type: ignore[index, arg-type]
        assert not found[:, :, sum(lengths) :].any()  # type: ignore[index]
    out, lse, _ = reference.attend(x)
    loss = (out * d_out).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * d_lse).sum()
    for a, b in zip(torch.autograd.grad(loss, (x.q, x.k, x.v)), grads, strict=False):
        assert_close(a, b)  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [{}, {"left": 2}, {"softcap": 1.5, "alibi_slopes": torch.rand(3, 4)}])
@pytest.mark.parametrize("paged", [False, True])
def test_decode_is_the_last_rows_of_dense_attention(more: dict[str, Any], paged: bool) -> None:
    lengths, Lq, capacity = [6, 1, 0], 2, 8
    q = torch.randn(3, 4, Lq, 2, dtype=DOUBLE)
    k, v = torch.randn(3, 2, capacity, 2, dtype=DOUBLE), torch.randn(3, 2, capacity, 3, dtype=DOUBLE)
    caches, table = (k, v), None
    if paged:
        order = torch.randperm(3 * 4 + 1)[: 3 * 4].view(3, 4)
        table = order.to(torch.int32)
        caches = tuple(torch.full((13, 2, 2, t.shape[3]), torch.nan, dtype=DOUBLE) for t in (k, v))
        for cache, t in zip(caches, (k, v), strict=True):
            cache[order] = t.unflatten(2, (4, 2)).transpose(1, 2)
    x = DecodeOperands(q, *caches, torch.tensor(lengths, dtype=torch.int32), table, right=0, scale=0.7, **more)
    out, lse = reference.decode(x)
    slopes = more.get("alibi_slopes")
    for b, n in enumerate(lengths):
        history = max(n, Lq)
        whole = Operands(
            torch.cat([torch.zeros(1, 4, history - Lq, 2, dtype=DOUBLE), q[b : b + 1]], 2),
            k[b : b + 1, :, :n], v[b : b + 1, :, :n], left=more.get("left", -1), right=0, end=True, scale=0.7,
            softcap=more.get("softcap", 0.0), alibi_slopes=None if slopes is None else slopes[b : b + 1],
        )  # fmt: skip
        want, m, l = reference.forward(whole)
        assert_close(out[b], want[0, :, -Lq:])
        assert_close(lse[b], reference.lse_of(m, l)[0, :, -Lq:])
    assert not out[2].any()
    assert not out[1, :, 0].any()
