"""A training step of PyTorch's encoder, with its attention replaced and run by the Triton kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import attn
from attn.testing import assert_module_close, spy


@pytest.mark.parametrize("causal", [False, True])
def test_training_step_of_an_encoder(causal: bool) -> None:
    layer = nn.TransformerEncoderLayer(24, 2, 32, dropout=0.0, batch_first=True)
    stock = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    ours, exact = attn.replace(copy.deepcopy(stock), backend="triton"), copy.deepcopy(stock).double()
    x = torch.randn(2, 35, 24)
    hidden = torch.arange(35) >= torch.tensor([[35], [20]])
    mask = nn.Transformer.generate_square_subsequent_mask(35) if causal else None
    losses = []
    for model in (stock, ours, exact):
        dtype = next(model.parameters()).dtype
        step = torch.optim.SGD(model.parameters(), lr=0.1)
        padding = hidden.to(dtype).masked_fill(hidden, -torch.inf)
        with spy() as calls:
            out = model(x.to(dtype), mask=None if mask is None else mask.to(dtype), src_key_padding_mask=padding)
            loss = out.masked_fill(hidden[..., None], 0.0).square().mean()
            loss.backward()
        if model is ours:
            passes = ["forward", "forward", "backward", "backward"]
            assert calls == [("triton", what) for what in passes]
        step.step()
        losses.append(loss)
    assert_module_close(losses[1], losses[2], losses[0], "loss")
    for (name, a), b, c in zip(ours.named_parameters(), exact.parameters(), stock.parameters(), strict=True):
        assert_module_close(a, b, c, name)
