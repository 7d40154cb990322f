"""A BERT finds the characters that were hidden in Python's manual: two minutes on a CPU.

15 % of the characters are chosen; of these 80 % are hidden, 10 % become others and 10 % stay.

python examples/bert.py --out out
"""

from __future__ import annotations

import torch
from plumbing import Manual, arguments, plot, train
from torch import Tensor
from torch.nn import functional as F

from attn import transformer as tf

LENGTH = 128


def main() -> None:
    """Trains, and compares with always guessing the most frequent character."""
    given = arguments(__doc__)
    manual = Manual()
    V = len(manual.letters)  # one id more hides
    config = tf.LayerConfig(128, 4, 256, dropout=0.0, norm_first=True, activation="gelu")
    model = tf.BERT(V + 1, config, num_layers=2, max_len=LENGTH, positions="rotary")
    pieces = manual.pieces(LENGTH, 60)
    hidden, chosen = tf.hide(pieces, V, V, generator=torch.Generator().manual_seed(1))

    def loss() -> Tensor:
        batch = manual.batch(8, LENGTH)
        seen, places = tf.hide(batch, V, V)
        return F.cross_entropy(model(seen)[places], batch[places])

    def accuracy() -> float:
        return float((model(hidden).argmax(-1) == pieces)[chosen].float().mean())

    steps = 20 if given.quick else 400
    seen = train(model, loss, steps, given.seconds, every=steps // 4, check=accuracy)
    most_frequent = manual.train.bincount(minlength=V).argmax()
    baseline = float((pieces[chosen] == most_frequent).float().mean())

    model.eval()
    with torch.no_grad():
        found = model(hidden[:1]).argmax(-1)[0]
    shown = [manual.letters[n] if n < V else "_" for n in hidden[0].tolist()]
    filled = [manual.letters[n] if c else s for n, c, s in zip(found.tolist(), chosen[0].tolist(), shown, strict=True)]
    print(f"hidden: {''.join(shown)!r}\nfilled: {''.join(filled)!r}\nwas:    {manual.text(pieces[0])!r}")

    plot(given.out / "bert.png", {"BERT": seen}, {"most frequent": baseline}, "accuracy at chosen characters")
    print(f"accuracy at {int(chosen.sum())} chosen characters: BERT {seen[-1][1]:.3f}, most frequent {baseline:.3f}")


if __name__ == "__main__":
    main()
