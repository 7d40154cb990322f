"""Keys and values of the tokens that were decoded so far."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attn.operands import check_range
from attn.transformer.config import LayerConfig, positive


class Memory(NamedTuple):
    """What cross-attention keeps of a memory: keys and values (N, Hkv, S, D), padding mask (N, S)."""

    k: Tensor
    v: Tensor
    padding: Tensor | None


class KVCache:
    """A key-value cache for all layers of a decoder, contiguous or paged (Kwon et al., 2023).

    A sequence n holds `lengths[n]` tokens. A paged cache gives each sequence pages of `block_size` tokens out of one
    pool as it grows, so that the pool may be smaller than all sequences at their longest.

    Args:
        config: of the layers: heads and head_dim.
        layers: how many.
        batch: sequences, N.
        capacity: tokens that a sequence may reach.
        block_size: tokens of a page; None for a contiguous cache.
        blocks: pages in the pool; None for as many as all sequences at their longest need.
        dtype: of keys and values.
        device: where they lie.

    Raises ValueError for a size < 1, and for `blocks` without `block_size`.
    """

    def __init__(
        self,
        config: LayerConfig,
        layers: int,
        batch: int,
        capacity: int,
        *,
        block_size: int | None = None,
        blocks: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.capacity, self.block_size = positive("capacity", capacity), block_size
        positive("batch", batch)
        heads, pool, rows = config.num_kv_heads or config.nhead, batch, capacity
        self.block_table: Tensor | None = None
        if block_size is not None:
            pages = -(-capacity // positive("block_size", block_size))
            pool, rows = batch * pages if blocks is None else positive("blocks", blocks), block_size
            self.block_table = torch.zeros(batch, pages, dtype=torch.int32, device=device)
        elif blocks is not None:
            raise ValueError(f"blocks is {blocks}, but a cache has pages only with block_size")
        shape = (positive("layers", layers), pool, heads, rows, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.used = 0
        """At least as much as any of `lengths`, known without asking a GPU."""
        self._pages_given = 0

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.lengths.shape[0]

    def check(self, config: LayerConfig, layers: int, batch: int) -> None:
        """Raise ValueError for a cache that was made for another model or batch."""
        want = (layers, config.num_kv_heads or config.nhead, config.head_dim, batch)
        have = (self.k.shape[0], self.k.shape[2], self.k.shape[4], self.batch)
        if want != have:
            raise ValueError(f"cache: (layers, heads, head_dim, batch) are {have}; this call needs {want}")

    def layer(self, n: int) -> LayerCache:
        """The cache of layer n."""
        return LayerCache(self, n)

    def positions(self, new: int) -> Tensor:
        """The positions (N, new) of the next `new` tokens."""
        return self.lengths.long()[:, None] + torch.arange(new, device=self.lengths.device)

    def reserve(self, new: int) -> None:
        """Make room for `new` tokens more per sequence.

        Raises ValueError where the capacity or the pool of pages does not suffice; the cache stays as it was.
        """
        end = self.used + new
        if end > self.capacity:
            raise ValueError(
                f"cache: {new} new tokens after {self.used} overflow its capacity of {self.capacity}; give a larger one"
            )
        if self.block_size is None or self.block_table is None:
            return
        have, need = (-(-n // self.block_size) for n in (self.used, end))
        pool, wanted = self.k.shape[1], (need - have) * self.batch
        if self._pages_given + wanted > pool:
            free = pool - self._pages_given
            raise ValueError(f"cache: {new} new tokens need {wanted} pages more; {free} of blocks={pool} are free")
        for page in range(have, need):
            first = self._pages_given
            self.block_table[:, page] = torch.arange(first, first + self.batch, dtype=torch.int32)
            self._pages_given += self.batch

    def advance(self, new: int, lengths: Tensor | None = None) -> None:
        """Count `new` tokens more, or set the `lengths` (N,) after a first call with prompts of different lengths."""
        self.used += new
        if lengths is None:
            self.lengths = self.lengths + new
            return
        if tuple(lengths.shape) != (self.batch,):
            raise ValueError(f"lengths has shape {tuple(lengths.shape)}; it must be ({self.batch},)")
        check_range("lengths", lengths, 0, self.used)
        self.lengths = lengths.to(self.lengths)

    def reorder(self, rows: Tensor) -> None:
        """Sequence n becomes a copy of sequence rows[n]: what a beam search needs. `rows` is integer (N,)."""
        if tuple(rows.shape) != (self.batch,):
            raise ValueError(f"rows has shape {tuple(rows.shape)}; it must be ({self.batch},)")
        check_range("rows", rows, 0, self.batch - 1)
        for t in (self.k, self.v):
            if self.block_table is None:
                t.copy_(t[:, rows])
                continue
            pages = self.block_table[:, : -(-self.used // (self.block_size or 1))].long()
            t[:, pages] = t[:, pages[rows]]
        self.lengths = self.lengths[rows]


class LayerCache:
    """One layer's part of a `KVCache`."""

    def __init__(self, whole: KVCache, n: int) -> None:
        self.whole, self.k, self.v = whole, whole.k[n], whole.v[n]

    def write(self, k: Tensor, v: Tensor) -> None:
        """Put new keys and values (N, Hkv, L, D) behind those that are there."""
        positions = self.whole.positions(k.shape[2])
        table, size = self.whole.block_table, self.whole.block_size
        if table is None or size is None:
            blocks, rows = torch.arange(k.shape[0], device=k.device)[:, None], positions
        else:
            check_range("block_table", table, 0, self.k.shape[0] - 1)
            blocks, rows = table.long().gather(1, positions // size), positions % size
        self.k[blocks, :, rows] = k.transpose(1, 2).to(self.k.dtype)
        self.v[blocks, :, rows] = v.transpose(1, 2).to(self.v.dtype)

    def contents(self) -> tuple[Tensor, Tensor]:
        """Keys and values (N, Hkv, S, D) in order; S is `whole.capacity`, or full pages."""
        table = self.whole.block_table
        if table is None:
            return self.k, self.v
        k, v = (t[table.long()].transpose(1, 2).flatten(2, 3) for t in (self.k, self.v))
        return k, v
