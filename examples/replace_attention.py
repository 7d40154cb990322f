"""Swap the attention of a PyTorch model for ours, check it, train it, look at its weights: seconds on a CPU.

python examples/replace_attention.py
"""

import torch
from torch import nn

import attn


def main() -> None:
    """Prints what each step shows."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
    x = torch.randn(3, 20, 64)
    padding = torch.arange(20) >= torch.tensor([[20], [13], [6]])  # True hides, as everywhere in torch.nn

    stock = model(x, src_key_padding_mask=padding)
    attn.replace(model)
    ours = model(x, src_key_padding_mask=padding)
    print(f"largest difference of the outputs: {(ours - stock)[~padding].abs().max():.1e}")

    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(3):
        loss = (model(x, src_key_padding_mask=padding) - x)[~padding].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss:.4f}")

    with attn.capture_weights(model) as weights, torch.no_grad():
        model(x, src_key_padding_mask=padding)
    for name, (w,) in weights.items():
        print(f"{name}: weights {tuple(w.shape)}, of hidden keys at most {w[padding[:, None].expand_as(w)].max():.1e}")

    attn.restore(model)
    print(f"restored: {type(model.layers[0].self_attn).__module__}.{type(model.layers[0].self_attn).__name__}")


if __name__ == "__main__":
    main()
