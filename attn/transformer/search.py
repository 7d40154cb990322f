"""Greedy and beam search for the decoder of a memory."""

from __future__ import annotations

import torch
from torch import Tensor

from attn.transformer.cache import Memory
from attn.transformer.config import positive
from attn.transformer.layers import Pair
from attn.transformer.seq2seq import CrossDecoder


@torch.no_grad()
def greedy(
    decoder: CrossDecoder,
    memory: Tensor | Pair,
    memory_padding: Tensor | None = None,
    *,
    start: int,
    end: int,
    max_new: int,
) -> Tensor:
    """The likeliest token at each step, with a cache.

    Args:
        decoder: in eval mode.
        memory: what it attends to, as in `CrossDecoder.forward`.
        memory_padding: bool (N, S), True hides.
        start: the token to begin with.
        end: the token that ends a sequence.
        max_new: at most so many tokens, `end` included.

    Returns integer (N, n) with n <= max_new, without `start`; behind an `end` only `end` follows.
    """
    keys = memory[0] if isinstance(memory, tuple) else memory
    cache = decoder.new_cache(keys.shape[0], positive("max_new", max_new))
    memories = decoder.remember(memory, memory_padding)
    token = torch.full((keys.shape[0], 1), start, device=keys.device)
    found: list[Tensor] = []
    done = torch.zeros_like(token, dtype=torch.bool)
    while len(found) < max_new and not bool(done.all()):
        token = decoder.step(token, cache, memories)[:, -1].argmax(-1, keepdim=True)
        token = token.masked_fill(done, end)
        done = done | (token == end)
        found.append(token)
    return torch.cat(found, 1)


@torch.no_grad()
def beam(
    decoder: CrossDecoder,
    memory: Tensor | Pair,
    memory_padding: Tensor | None = None,
    *,
    start: int,
    end: int,
    max_new: int,
    width: int = 4,
    length_penalty: float = 0.6,
) -> Tensor:
    """Beam search with a cache: the sequence with the best log-probability / length ** length_penalty.

    Args:
        decoder: in eval mode.
        memory: what it attends to, as in `CrossDecoder.forward`.
        memory_padding: bool (N, S), True hides.
        start: the token to begin with.
        end: the token that ends a sequence.
        max_new: at most so many tokens, `end` included.
        width: sequences kept per step.
        length_penalty: 0 for none; larger favours longer sequences.

    Returns integer (N, n) with n <= max_new, without `start`; behind an `end` only `end` follows.
    """
    positive("width", width)
    keys = memory[0] if isinstance(memory, tuple) else memory
    N, device = keys.shape[0], keys.device
    cache = decoder.new_cache(N * width, positive("max_new", max_new))
    memories = [_repeated(m, width) for m in decoder.remember(memory, memory_padding)]
    tokens = torch.full((N * width, 1), start, device=device)
    scores = torch.full((N, width), -torch.inf, device=device)
    scores[:, 0] = 0.0  # the beams are all alike at first: only one of them counts
    done = torch.zeros(N, width, dtype=torch.bool, device=device)
    lengths = torch.zeros(N, width, device=device)
    for _ in range(max_new):
        step = decoder.step(tokens[:, -1:], cache, memories)[:, -1].float().log_softmax(-1).view(N, width, -1)
        V = step.shape[-1]
        ended = torch.full((V,), -torch.inf, device=device)
        ended[end] = 0.0
        step = torch.where(done[..., None], ended, step)
        lengths = lengths + ~done
        ranked = (scores[..., None] + step) / lengths[..., None] ** length_penalty
        best = ranked.view(N, -1).topk(width).indices
        parent, token = best // V, best % V
        scores = (scores[..., None] + step).view(N, -1).gather(1, best)
        done, lengths = done.gather(1, parent) | (token == end), lengths.gather(1, parent)
        rows = (parent + width * torch.arange(N, device=device)[:, None]).flatten()
        cache.reorder(rows)
        tokens = torch.cat((tokens[rows], token.view(-1, 1)), 1)
        if bool(done.all()):
            break
    first = (scores / lengths**length_penalty).argmax(1) + width * torch.arange(N, device=device)
    return tokens[first, 1:]


def _repeated(memory: Memory, width: int) -> Memory:
    """Each sequence `width` times."""
    padding = None if memory.padding is None else memory.padding.repeat_interleave(width, 0)
    return Memory(memory.k.repeat_interleave(width, 0), memory.v.repeat_interleave(width, 0), padding)
