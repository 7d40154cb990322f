"""A GPT learns Python's manual character by character, and writes with a key-value cache: two minutes on a CPU.

python examples/gpt.py --out out
"""

from __future__ import annotations

import math
import time

import torch
from plumbing import Manual, arguments, plot, train
from torch import Tensor
from torch.nn import functional as F

from attn import transformer as tf

LENGTH = 128
PROMPT = "If the argument is a class, the method "


def bits(model: tf.GPT, pieces: Tensor) -> float:
    """Bits per held-out character; the first ones of each piece have little to go by, and count too."""
    loss = F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())
    return float(loss) / math.log(2)


def speed(model: tf.GPT, prompt: Tensor, new: int) -> dict[str, float]:
    """Characters per second with each cache, the median of three interleaved runs."""
    times: dict[str, list[float]] = {"static": [], "paged": [], "none": []}
    for _ in range(3):
        for cache, seen in times.items():
            start = time.perf_counter()
            model.generate(prompt, new, cache=cache)
            seen.append(time.perf_counter() - start)
    return {cache: prompt.shape[0] * new / sorted(seen)[1] for cache, seen in times.items()}


def main() -> None:
    """Trains, compares with the bigrams, writes, and times the caches."""
    given = arguments(__doc__)
    manual = Manual()
    config = tf.LayerConfig(128, 4, 256, dropout=0.0, norm="rms", norm_first=True, activation="swiglu")
    model = tf.GPT(len(manual.letters), config, num_layers=3, max_len=512, positions="rotary")
    pieces = manual.pieces(LENGTH + 1, 40)

    def loss() -> Tensor:
        batch = manual.batch(8, LENGTH + 1)
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    steps = 20 if given.quick else 700
    seen = train(model, loss, steps, given.seconds, every=steps // 7, check=lambda: bits(model, pieces))
    model.eval()

    prompt = manual.ids(PROMPT)[None]
    written = model.generate(prompt, 200, temperature=0.7, generator=torch.Generator().manual_seed(given.seed))
    print(f"prompt:  {PROMPT!r}\nwritten: {manual.text(written[0, len(PROMPT) :])!r}")
    per_second = speed(model, prompt, 32 if given.quick else 400)
    print(", ".join(f"cache {name}: {value:.0f} characters per second" for name, value in per_second.items()))

    baseline = manual.bigram_bits()
    plot(given.out / "gpt.png", {"GPT": seen}, {"bigrams": baseline}, "bits per held-out character")
    print(f"bits per held-out character: GPT {seen[-1][1]:.3f}, bigrams {baseline:.3f}")


if __name__ == "__main__":
    main()
