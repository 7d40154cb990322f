"""Models of installed libraries on our kernels: same outputs and gradients as with PyTorch's, and every call is ours.

The libraries are no dependencies: where one is missing, or does not import, its tests are skipped. `.ci/run` installs
transformers and diffusers for them; timm and open_clip need a torchvision that fits the torch that is there.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attn
from attn.integrations import sdpa_override
from attn.testing import assert_module_close, spy

pytestmark = pytest.mark.slow
Built = tuple[nn.Module, Callable[[nn.Module], Tensor]]


def library(name: str) -> Any:
    package = name.partition(".")[0]
    return pytest.importorskip(name, reason=f"pip install {package} runs these tests", exc_type=ImportError)


def siglip() -> Built:
    """SigLIP's vision model; its pooling head attends with one learned query."""
    transformers = library("transformers")
    config = transformers.SiglipVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    return transformers.SiglipVisionModel(config), lambda m: m(drawn(m, 2, 3, 32, 32)).pooler_output


def bridgetower() -> Built:
    """BridgeTower's vision transformer, CLIP's residual attention blocks."""
    towers = library("transformers.models.bridgetower.modeling_bridgetower")
    config = library("transformers").BridgeTowerVisionConfig(
        hidden_size=64, num_hidden_layers=3, image_size=32, patch_size=8
    )
    return towers.BridgeTowerVisionModel(config), lambda m: m(drawn(m, 2, 3, 32, 32))


def open_clip() -> Built:
    """CLIP, images and texts; the texts' attention is causal by a float mask of -inf."""
    vision = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 12, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    model = library("open_clip").CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text)
    tokens = torch.randint(50, (2, 12))
    return model, lambda m: torch.cat(m(drawn(m, 2, 3, 32, 32), tokens)[:2])


def timm_vit() -> Built:
    """timm's vision transformer; its attention calls PyTorch's function."""
    model = library("timm.models.vision_transformer").VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=5
    )
    return model, lambda m: m(drawn(m, 2, 3, 32, 32))


def unet() -> Built:
    """diffusers' U-Net: self-attention of pixels and cross-attention to a text, by an attention processor."""
    model = library("diffusers").UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    )
    return model, lambda m: m(drawn(m, 2, 4, 8, 8), torch.tensor([3, 7]), drawn(m, 2, 5, 12)).sample


def flux() -> Built:
    """diffusers' Flux, whose attention goes through the library's registry, to its backend `native`."""
    model = library("diffusers").FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 4, 8),
    )

    def run(m: nn.Module) -> Tensor:
        places = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(4))
        return m(
            hidden_states=drawn(m, 2, 16, 4),
            encoder_hidden_states=drawn(m, 2, 5, 12),
            pooled_projections=drawn(m, 2, 12),
            timestep=torch.tensor([0.3, 0.7]).to(drawn(m, 1)),
            img_ids=places.to(drawn(m, 1)),
            txt_ids=torch.zeros(5, 3).to(drawn(m, 1)),
        ).sample

    return model, run


def drawn(model: nn.Module, *shape: int) -> Tensor:
    """The same numbers on each call, in the model's dtype."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("build", [siglip, bridgetower, open_clip])
def test_a_replaced_model_gives_the_same(build: Callable[[], Built], train: bool) -> None:
    model, run = build()
    ours = attn.replace(copy.deepcopy(without_dropout(model, train)))
    held = [n for n, m in ours.named_modules() if isinstance(m, attn.MultiheadAttention)]
    called: list[str] = []
    for name in held:
        ours.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    with spy() as served:
        out = run(ours)
    assert sorted(called) == sorted(held)
    assert len(served) == len(held) > 0
    assert_same(model, ours, out, run)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("build", "calls"), [(timm_vit, 2), (unet, 8), (flux, 2)])
def test_inside_of_the_override(build: Callable[[], Built], calls: int, train: bool) -> None:
    model, run = build()
    ours = copy.deepcopy(without_dropout(model, train))
    with sdpa_override() as routed, spy() as served:
        out = run(ours)
    assert routed.calls == calls
    assert [what for _, what in served] == ["forward"] * calls
    with spy() as stray:
        assert_same(model, ours, out, run)
    assert {what for _, what in stray} == {"backward"}


def without_dropout(model: nn.Module, train: bool) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        elif isinstance(m, nn.MultiheadAttention):
            m.dropout = 0.0
    return model.train(train)


def assert_same(stock: nn.Module, ours: nn.Module, out: Tensor, run: Callable[[nn.Module], Tensor]) -> None:
    """`out`, which `ours` gave, and its gradients, beside the library's in float64 and in float32."""
    exact = copy.deepcopy(stock).double()
    results = [out, run(exact), run(stock)]
    assert_module_close(*results)
    for result in results:
        result.square().sum().backward()
    for (name, p), e, s in zip(ours.named_parameters(), exact.parameters(), stock.parameters(), strict=True):
        if s.grad is not None or p.grad is not None:
            assert p.grad is not None, name
            assert_module_close(p.grad, e.grad, s.grad, name)
