"""Models of an installed library that hold `nn.MultiheadAttention`, replaced: same outputs and gradients, ours called.

transformers is no dependency: where it is missing these tests are skipped. `.ci/run` installs it for them.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attn
from attn.testing import assert_module_close

transformers = pytest.importorskip("transformers", reason="pip install transformers runs these tests")
pytestmark = pytest.mark.slow


def siglip() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """SigLIP's vision model; its pooling head attends with one learned query."""
    config = transformers.SiglipVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    return transformers.SiglipVisionModel(config), lambda m: m(images(m)).pooler_output


def bridgetower() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """BridgeTower's vision transformer, CLIP's residual attention blocks."""
    from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerVisionModel

    config = transformers.BridgeTowerVisionConfig(hidden_size=64, num_hidden_layers=3, image_size=32, patch_size=8)
    return BridgeTowerVisionModel(config), lambda m: m(images(m))


def images(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    parameter = next(model.parameters())
    return torch.randn(2, 3, 32, 32, generator=generator).to(parameter.dtype)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("build", [siglip, bridgetower])
def test_replaced_model_gives_the_same(build, train):
    torch.manual_seed(0)
    model, run = build()
    stock, exact = model.train(train), copy.deepcopy(model).double().train(train)
    ours = attn.replace(copy.deepcopy(stock))
    held = [n for n, m in ours.named_modules() if isinstance(m, attn.MultiheadAttention)]
    calls: list[str] = []
    for name in held:
        ours.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    with attn.testing.spy() as served:
        results = [run(m) for m in (ours, exact, stock)]
    assert sorted(calls) == sorted(held)
    assert len(served) == len(held) > 0
    assert_module_close(*results)
    for out in results:
        out.square().sum().backward()
    for (name, p), e, s in zip(ours.named_parameters(), exact.parameters(), stock.parameters(), strict=True):
        if s.grad is not None or p.grad is not None:
            assert p.grad is not None, name
            assert_module_close(p.grad, e.grad, s.grad)
