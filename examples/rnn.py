"""The recurrent nets that came before, on the task of gpt.py, beside a GPT of like size: three minutes on a CPU.

python examples/rnn.py --out out
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from plumbing import Manual, arguments, plot, train
from torch import Tensor, nn
from torch.nn import functional as F

from attn import transformer as tf

LENGTH = 128


class Recurrent(nn.Module):
    """Characters in, scores of the next one out, by `nn.RNN`, `nn.GRU` or `nn.LSTM`."""

    def __init__(self, kind: type[nn.RNNBase], vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.net = kind(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores (N, L, vocab_size) of tokens (N, L)."""
        return self.head(self.net(self.embedding(tokens))[0])


def models(vocab_size: int) -> dict[str, Callable[[], nn.Module]]:
    """Each with about 300 thousand parameters."""
    config = tf.LayerConfig(112, 4, 224, dropout=0.0, norm="rms", norm_first=True, activation="swiglu")
    return {
        "GPT": lambda: tf.GPT(vocab_size, config, num_layers=2, max_len=LENGTH, positions="rotary"),
        "LSTM": lambda: Recurrent(nn.LSTM, vocab_size, 128),
        "GRU": lambda: Recurrent(nn.GRU, vocab_size, 144),
        "RNN": lambda: Recurrent(nn.RNN, vocab_size, 224),
    }


def main() -> None:
    """Trains each for the same number of steps on the same batches."""
    given = arguments(__doc__)
    manual = Manual()
    pieces = manual.pieces(LENGTH + 1, 40)
    steps = 10 if given.quick else 200
    curves: dict[str, list[tuple[int, float]]] = {}
    lines = []
    for name, make in models(len(manual.letters)).items():
        model = make()
        torch.manual_seed(given.seed)  # the same batches for each
        size = sum(p.numel() for p in model.parameters())
        print(f"{name}: {size} parameters")

        def loss(of: Tensor | None = None, model: nn.Module = model) -> Tensor:
            batch = manual.batch(8, LENGTH + 1) if of is None else of
            return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

        def bits(loss: Callable[[Tensor], Tensor] = loss) -> float:
            return float(loss(pieces)) / math.log(2)

        start = time.process_time()
        curves[name] = train(model, loss, steps, given.seconds / 4, every=steps // 5, check=bits)
        used = time.process_time() - start
        lines.append(f"{name}: {curves[name][-1][1]:.3f} bits per held-out character, {used:.0f} s of processor time")
    baseline = manual.bigram_bits()
    plot(given.out / "rnn.png", curves, {"bigrams": baseline}, "bits per held-out character")
    print("\n".join(lines))
    print(f"bigrams: {baseline:.3f} bits per held-out character")


if __name__ == "__main__":
    main()
