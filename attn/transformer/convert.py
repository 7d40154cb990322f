"""Between our layers and stacks and those of `torch.nn`: the same weights, the same results."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from attn.transformer.config import LayerConfig
from attn.transformer.layers import DecoderLayer, EncoderLayer
from attn.transformer.norms import make_norm
from attn.transformer.stacks import Decoder, Encoder, Transformer

_TORCH_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def from_torch(module: nn.Module, **changes: Any) -> nn.Module:
    """Our module with a copy of the weights of PyTorch's.

    Args:
        module: nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerEncoder, nn.TransformerDecoder or
            nn.Transformer, or one whose attention `attn.replace` replaced.
        changes: fields of `LayerConfig` that shall differ, such as `causal=True` where PyTorch's is called with masks.
            Those that ask for other weights raise.

    Returns:
        EncoderLayer, DecoderLayer, Encoder, Decoder or Transformer with the same outputs and gradients, in the same
        training mode, dtype and device.

    Raises:
        TypeError: another module, a subclass, or an activation, norm or layer that ours have no form for.
        RuntimeError: changes that do not fit the weights.
    """
    ours: nn.Module
    if type(module) is nn.TransformerEncoderLayer:
        ours = EncoderLayer(_config(module, changes))
    elif type(module) is nn.TransformerDecoderLayer:
        ours = DecoderLayer(_config(module, changes))
    elif type(module) is nn.TransformerEncoder:
        ours = Encoder(_config_of_stack(module, changes), len(module.layers), final_norm=_has_norm(module))
    elif type(module) is nn.TransformerDecoder:
        ours = Decoder(_config_of_stack(module, changes), len(module.layers), final_norm=_has_norm(module))
    elif type(module) is nn.Transformer:
        ours = _whole(module, changes)
    else:
        raise TypeError(
            f"from_torch: module is {type(module).__name__}; give nn.TransformerEncoderLayer, "
            "nn.TransformerDecoderLayer, nn.TransformerEncoder, nn.TransformerDecoder or nn.Transformer"
        )
    ours.to(next(module.parameters()))
    ours.load_state_dict(module.state_dict())
    return _alike(ours, module)


def to_torch(module: nn.Module) -> nn.Module:
    """PyTorch's module with a copy of the weights of ours: the way back of `from_torch`.

    A causal layer becomes one that needs a causal mask.

    Raises TypeError for another module, or for one that PyTorch has no form for, and says why.
    """
    theirs: nn.Module
    if isinstance(module, (EncoderLayer, DecoderLayer)):
        theirs = _torch_layer(module)
    elif isinstance(module, Encoder):
        layer, norm = _torch_layer(module.layers[0]), _torch_norm(module)
        theirs = nn.TransformerEncoder(layer, len(module.layers), norm, enable_nested_tensor=False)  # type: ignore[arg-type]
    elif isinstance(module, Decoder):
        theirs = nn.TransformerDecoder(_torch_layer(module.layers[0]), len(module.layers), _torch_norm(module))  # type: ignore[arg-type]
    elif isinstance(module, Transformer):
        options = _torch_options(module.encoder.layers[0])
        _torch_options(module.decoder.layers[0])
        theirs = nn.Transformer(
            num_encoder_layers=len(module.encoder.layers), num_decoder_layers=len(module.decoder.layers), **options
        )
    else:
        raise TypeError(
            f"to_torch: module is {type(module).__name__}; give EncoderLayer, DecoderLayer, Encoder, Decoder or "
            "Transformer"
        )
    theirs.to(next(module.parameters()))
    theirs.load_state_dict(module.state_dict())
    return _alike(theirs, module)


def _config(layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, changes: dict[str, Any]) -> LayerConfig:
    """What a layer of PyTorch's is made of."""
    activation: Any = layer.activation
    if activation in (F.relu, torch.relu) or isinstance(activation, nn.ReLU):
        name = "relu"
    elif activation is F.gelu or (isinstance(activation, nn.GELU) and activation.approximate == "none"):
        name = "gelu"
    else:
        raise TypeError(f"from_torch: activation is {activation!r}; ours are relu, gelu and swiglu")
    attention = layer.self_attn
    fields: dict[str, Any] = {
        "d_model": attention.embed_dim,
        "nhead": attention.num_heads,
        "dim_feedforward": layer.linear1.out_features,
        "dropout": layer.dropout.p,
        "activation": name,
        "norm_first": layer.norm_first,
        "norm_eps": layer.norm1.eps,
        "bias": attention.in_proj_bias is not None,
        "batch_first": attention.batch_first,
    }
    return LayerConfig(**(fields | changes))


def _config_of_stack(stack: nn.TransformerEncoder | nn.TransformerDecoder, changes: dict[str, Any]) -> LayerConfig:
    for layer in stack.layers:
        if type(layer) not in _TORCH_LAYERS:
            raise TypeError(f"from_torch: the stack holds a {type(layer).__name__}; ours has PyTorch's layers only")
    configs = [_config(layer, changes) for layer in stack.layers]
    if any(c != configs[0] for c in configs):
        raise TypeError("from_torch: the layers of the stack differ from each other; convert them one by one")
    return configs[0]


def _whole(module: nn.Transformer, changes: dict[str, Any]) -> Transformer:
    if type(module.encoder) is not nn.TransformerEncoder or type(module.decoder) is not nn.TransformerDecoder:
        raise TypeError("from_torch: the nn.Transformer holds an encoder or decoder of its own; convert its parts")
    _config_of_stack(module.encoder, changes)
    config = _config_of_stack(module.decoder, changes)
    return Transformer(config, len(module.encoder.layers), len(module.decoder.layers))


def _has_norm(stack: nn.TransformerEncoder | nn.TransformerDecoder) -> bool:
    if stack.norm is not None and not isinstance(stack.norm, nn.LayerNorm):
        raise TypeError(
            f"from_torch: the final norm is a {type(stack.norm).__name__}; PyTorch's default is nn.LayerNorm"
        )
    return stack.norm is not None


def _torch_options(layer: Any) -> dict[str, Any]:
    """Arguments of PyTorch's layer for one of ours."""
    c = layer.config
    reasons = {
        f"norm={c.norm!r}": c.norm != "layer",
        f"activation={c.activation!r}": c.activation == "swiglu",
        f"window={c.window}": c.window is not None,
        f"num_kv_heads={c.num_kv_heads}": c.num_kv_heads not in (None, c.nhead),
        "rotary": c.rotary is not None,
        "position_bias": layer.self_attn.position_bias is not None,
        "kdim or vdim": isinstance(layer, DecoderLayer) and not layer.multihead_attn._qkv_same_embed_dim,
    }
    given = [reason for reason, holds in reasons.items() if holds]
    if given:
        raise TypeError(f"to_torch: PyTorch's layers have no {', '.join(given)}")
    return {
        "d_model": c.d_model,
        "nhead": c.nhead,
        "dim_feedforward": c.dim_feedforward,
        "dropout": c.dropout,
        "activation": c.activation,
        "layer_norm_eps": c.norm_eps,
        "batch_first": c.batch_first,
        "norm_first": c.norm_first,
        "bias": c.bias,
    }


def _torch_layer(layer: nn.Module) -> nn.TransformerEncoderLayer | nn.TransformerDecoderLayer:
    options = _torch_options(layer)
    if isinstance(layer, EncoderLayer):
        return nn.TransformerEncoderLayer(**options)
    return nn.TransformerDecoderLayer(**options)


def _torch_norm(stack: Encoder | Decoder) -> nn.LayerNorm | None:
    return None if stack.norm is None else make_norm(stack.config)  # type: ignore[return-value]


def _alike(new: nn.Module, old: nn.Module) -> nn.Module:
    """`new` in the training mode and with the frozen parameters of `old`."""
    for name, p in old.named_parameters():
        new.get_parameter(name).requires_grad_(p.requires_grad)
    return new.train(old.training)
