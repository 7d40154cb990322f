"""The norms of a layer by name."""

from __future__ import annotations

from torch import Tensor, nn

from attn.transformer.config import LayerConfig


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm of each feature over all tokens of a batch (paddings included), on (..., d_model)."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., d_model), of the same shape."""
        return super().forward(input.reshape(-1, input.shape[-1])).view(input.shape)


def make_norm(config: LayerConfig) -> nn.Module:
    """The norm that `config.norm` names, over `config.d_model` features."""
    if config.norm == "rms":
        return nn.RMSNorm(config.d_model, config.norm_eps)
    if config.norm == "batch":
        norm = TokenBatchNorm(config.d_model, config.norm_eps)
        if not config.bias:
            norm.register_parameter("bias", None)
        return norm
    return nn.LayerNorm(config.d_model, config.norm_eps, bias=config.bias)
