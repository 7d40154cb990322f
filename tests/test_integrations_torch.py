"""PyTorch's own attention function on our kernels: by its registry, and inside of a block."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.attention as torch_attention
from torch import Tensor, nn
from torch.nn import functional as F

import attn
from attn.integrations import register_torch, sdpa_override
from attn.testing import assert_close, assert_module_close, spy

B, H, L, S, D = 2, 4, 7, 9, 8


@pytest.fixture
def activated() -> Iterator[None]:
    if not hasattr(torch_attention, "register_flash_attention_impl"):
        pytest.skip("this torch has no registry of flash attention")
    register_torch()
    torch_attention.activate_flash_attention_impl("attn")
    yield
    torch_attention.restore_flash_attention_impl(_raise_warn=False)


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": torch.arange(S) < torch.tensor([[S], [4]]).view(B, 1, 1, 1)},
    "float mask": {"attn_mask": torch.linspace(-2, 1, L * S).view(L, S)},
    "lowest": {"attn_mask": torch.full((L, S), torch.finfo(torch.float32).min)},
    "grouped": {"enable_gqa": True},
    "scale": {"scale": 0.3},
}


def inputs(call: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Any]]:
    heads = 2 if call.get("enable_gqa") else H
    tensors = [torch.randn(B, H, L, D), torch.randn(B, heads, S, D), torch.randn(B, heads, S, D)]
    kwargs = {n: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in call.items()}
    return [t.to(dtype) for t in tensors], kwargs


def results(function: Any, tensors: list[Tensor], kwargs: dict[str, Any]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves, **kwargs)
    g = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, g)]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registry(activated: None, name: str, dtype: torch.dtype) -> None:
    tensors, kwargs = inputs(CALLS[name], dtype)
    with spy() as calls:
        ours = results(F.scaled_dot_product_attention, tensors, kwargs)
    assert {what for _, what in calls} == {"forward", "backward"}
    torch_attention.restore_flash_attention_impl()
    with spy() as calls:
        stock = results(F.scaled_dot_product_attention, tensors, kwargs)
        exact_inputs, exact_kwargs = [t.double() for t in tensors], kwargs
        if "attn_mask" in kwargs and kwargs["attn_mask"].is_floating_point():
            exact_kwargs = kwargs | {"attn_mask": kwargs["attn_mask"].double()}
        exact = results(attn.scaled_dot_product_attention, exact_inputs, exact_kwargs | {"backend": "reference"})
    assert {backend for backend, _ in calls} <= {"reference"}
    for n, (mine, truth, theirs) in enumerate(zip(ours, exact, stock, strict=True)):
        if name == "lowest" and n:  # PyTorch's gradients are wrong there
            theirs = truth
        assert_module_close(mine, truth, theirs, ("out", "dq", "dk", "dv")[n])


def test_registry_leaves_what_is_not_ours(activated: None) -> None:
    (q, k, v), _ = inputs({})
    with spy() as calls:
        F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        with attn.use_backend("sdpa"):
            F.scaled_dot_product_attention(q, k, v)
    assert calls == []
    with attn.use_backend("reference"), spy() as calls:
        F.scaled_dot_product_attention(q, k, v)
    assert calls == [("reference", "forward")]


def test_registry_under_a_module_of_pytorchs(activated: None) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    with spy() as calls:
        ours = layer(x)
    assert [what for _, what in calls] == ["forward"]
    torch_attention.restore_flash_attention_impl()
    assert_module_close(ours, copy.deepcopy(layer).double()(x.double()), layer(x))


@pytest.mark.slow
def test_registry_in_a_compiled_graph(activated: None) -> None:
    tensors, kwargs = inputs({"is_causal": True})
    expected = results(F.scaled_dot_product_attention, tensors, kwargs)
    compiled = torch.compile(F.scaled_dot_product_attention, fullgraph=True)
    with spy() as calls:
        found = results(compiled, tensors, kwargs)
    assert {what for _, what in calls} >= {"forward", "backward"}
    for mine, other in zip(found, expected, strict=True):
        assert_close(mine, other)


def test_registry_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch_attention, "register_flash_attention_impl")
    with pytest.raises(RuntimeError, match="no registry of flash attention"):
        register_torch()


@pytest.mark.parametrize("name", CALLS)
def test_override(name: str) -> None:
    tensors, kwargs = inputs(CALLS[name])
    expected = results(attn.scaled_dot_product_attention, tensors, kwargs)
    before = F.scaled_dot_product_attention
    with sdpa_override() as routed, spy() as calls:
        found = results(before, tensors, kwargs)
    assert routed.calls == 1
    assert calls
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)


def test_override_ends_with_its_block_and_holds_for_its_thread() -> None:
    (q, k, v), _ = inputs({})
    other: list[tuple[str, str]] = []

    def elsewhere() -> None:
        with spy() as calls:
            F.scaled_dot_product_attention(q, k, v)
        other.extend(calls)

    with sdpa_override() as routed:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert other == []
        assert routed.calls == 0
    with sdpa_override("sdpa"), spy() as calls:  # PyTorch's own, without coming back here
        F.scaled_dot_product_attention(q, k, v)
    assert calls == [("sdpa", "call")]
    with spy() as calls:
        F.scaled_dot_product_attention(q, k, v)
    assert calls == []


def test_override_refuses_what_it_does_not_know() -> None:
    (q, k, v), _ = inputs({})
    with sdpa_override("reference"):
        with pytest.raises(TypeError, match="window"):
            F.scaled_dot_product_attention(q, k, v, window=3)
        with pytest.raises(RuntimeError, match="attn_mask and is_causal"):
            F.scaled_dot_product_attention(q, k, v, torch.ones(L, S, dtype=torch.bool), is_causal=True)


class VisionBlock(nn.Module):
    """Attention as timm writes it: fused qkv, F.scaled_dot_product_attention behind a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(2, 5, 3, 4, 4).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, dropout_p=0.0).transpose(1, 2).flatten(2))


def test_override_serves_a_vision_block() -> None:
    block, x = VisionBlock(), torch.randn(2, 5, 16)
    with sdpa_override() as routed:
        ours = block(x)
    assert routed.calls == 1
    assert_module_close(ours, copy.deepcopy(block).double()(x.double()), block(x))


def test_snippets_of_the_document_run() -> None:
    page = Path(__file__).resolve().parent.parent / "docs" / "integrations.md"
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(snippets) == 4
    namespace: dict[str, Any] = {}
    for snippet in snippets[:3]:  # the last one needs transformers, whose tests have it
        exec(compile(snippet, page.name, "exec"), namespace)
    assert namespace["routed"].calls == 1
