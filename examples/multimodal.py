"""Names of handwritten digits, spelled from their images by cross-attention: one minute on a CPU.

An encoder reads the 16 patches of an 8 x 8 image. A decoder spells "zero" ... "nine" letter by letter; its
cross-attention takes keys from the encoded patches with their pixels beside them (kdim 36), and values from the encoded
patches alone (vdim 32). The plot shows which patches each name was read from.

python examples/multimodal.py --out out          (needs scikit-learn for its digits)
"""

from __future__ import annotations

from pathlib import Path

import torch
from plumbing import arguments, train
from torch import Tensor, nn
from torch.nn import functional as F

import attn
from attn import transformer as tf

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = ["^", "$", *sorted(set("".join(NAMES)))]  # start, end, letters
WIDTH, PIXELS = 32, 4


class Speller(nn.Module):
    """Images in, scores of the next letter out."""

    def __init__(self) -> None:
        super().__init__()
        config = tf.LayerConfig(WIDTH, 4, 64, dropout=0.1, norm_first=True, activation="gelu")
        self.patches = nn.Linear(PIXELS, WIDTH)
        self.places = tf.LearnedPositions(16, WIDTH)
        self.encoder = tf.Encoder(config, 2)
        self.decoder = tf.CrossDecoder(len(LETTERS), config, 2, max_len=8, kdim=WIDTH + PIXELS, vdim=WIDTH)

    def see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (N, 16, 36) and values (N, 16, 32) of images (N, 8, 8)."""
        pixels = images.unflatten(1, (4, 2)).unflatten(3, (4, 2)).transpose(2, 3).reshape(-1, 16, PIXELS)
        seen = self.encoder(self.places(self.patches(pixels)))
        return torch.cat((seen, pixels), -1), seen

    def forward(self, images: Tensor, letters: Tensor) -> Tensor:
        """Scores (N, L, letters) of the letter after each of `letters` (N, L)."""
        out: Tensor = self.decoder(letters, self.see(images))
        return out


def spelled(numbers: Tensor) -> Tensor:
    """Start, letters, and ends up to the longest name."""
    rows = [[0, *(LETTERS.index(letter) for letter in NAMES[n])] for n in numbers.tolist()]
    return torch.tensor([row + [1] * (7 - len(row)) for row in rows])


def read(model: Speller, images: Tensor) -> list[str]:
    """The names that the model spells."""
    found = tf.greedy(model.decoder, model.see(images), start=0, end=1, max_new=6)
    return ["".join(LETTERS[n] for n in row if n > 1) for row in found.tolist()]


def draw(model: Speller, images: Tensor, names: list[str], path: Path) -> None:
    """Each image beside the weights of the letter that tells its name apart, over the patches."""
    from matplotlib.figure import Figure

    letters = torch.tensor([[0, LETTERS.index(name[0])] for name in names])
    with torch.no_grad(), attn.capture_weights(model) as weights:
        model(images, letters)
    last = [w for n, w in weights.items() if n.endswith("multihead_attn")][-1][-1]
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    panels = figure.subplots(2, len(names))
    for n, name in enumerate(names):
        panels[0, n].imshow(images[n], cmap="gray_r")
        panels[1, n].imshow(last[n, -1].view(4, 4), cmap="Blues", vmin=0)
        panels[0, n].set_title(name, fontsize=10)
    for axes in panels.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle("digits, and where the second letter looks", fontsize=11)
    figure.savefig(path, dpi=130)
    print(f"plot: {path}")


def main() -> None:
    """Trains, and compares with the most frequent name and with logistic regression on the pixels."""
    given = arguments(__doc__)
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    data = load_digits()
    images, numbers = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held, rest = order[:360], order[360:]
    model, names = Speller(), spelled(numbers)
    wanted = [NAMES[n] for n in numbers[held].tolist()]

    def loss() -> Tensor:
        rows = rest[torch.randint(len(rest), (64,))]
        scores = model(images[rows], names[rows, :-1])
        return F.cross_entropy(scores.flatten(0, 1), names[rows, 1:].flatten())

    def accuracy() -> float:
        return sum(a == b for a, b in zip(read(model, images[held]), wanted, strict=True)) / len(held)

    steps = 20 if given.quick else 600
    seen = train(model, loss, steps, given.seconds, every=steps // 4, check=accuracy)
    model.eval()
    first = [int(held[numbers[held] == n][0]) for n in range(10)]
    draw(model, images[first], read(model, images[first]), given.out / "multimodal.png")

    common = float((numbers[held] == numbers[rest].bincount().argmax()).float().mean())
    flat = images.flatten(1).numpy()
    linear = LogisticRegression(max_iter=1000).fit(flat[rest], data.target[rest]).score(flat[held], data.target[held])
    print(
        f"names spelled right, of {len(held)} held-out digits: cross-attention {seen[-1][1]:.3f}, "
        f"most frequent {common:.3f}, logistic regression {linear:.3f}"
    )


if __name__ == "__main__":
    main()
