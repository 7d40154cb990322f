"""English to German, learned from the messages of web applications: three minutes on a CPU.

The sentences are the message catalogues inside of pip packages with free licences: Django's, and those of Wagtail and
Oscar where they are installed. Each tenth message of several words is held out. Prints BLEU of greedy and of beam
search beside copying the source and beside the translation of the most similar message that was trained on; saves an
attention map.

python -m pip install --no-deps django wagtail django-oscar && python -m pip install sacrebleu tokenizers
python examples/translation.py --out out
"""

from __future__ import annotations

import gettext
import importlib.util
import random
import re
from pathlib import Path

import torch
from plumbing import arguments, train
from torch import Tensor
from torch.nn import functional as F

import attn
from attn import transformer as tf

PACKAGES = ("django", "wagtail", "oscar")
PAD, START, END = 0, 1, 2
LONGEST = 40
BATCH = 32
SHOWN = "Please enter a valid email address."


def pairs() -> list[tuple[str, str]]:
    """English and German messages of up to 14 words."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            for path in sorted(Path(folder).rglob("locale/de/LC_MESSAGES/*.mo")):
                with path.open("rb") as file:
                    catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
                found |= {e: g for e, g in catalogue.items() if isinstance(e, str) and isinstance(g, str)}
    if not found:
        raise SystemExit("no message catalogues: python -m pip install --no-deps django wagtail django-oscar")
    clean = ((plain(e.rpartition("\x04")[2]), plain(g)) for e, g in found.items() if "<" not in e)
    return sorted({e: g for e, g in clean if 1 <= len(e.split()) <= 14 and g not in ("", e)}.items())


def plain(message: str) -> str:
    """One line, with X for what is filled in: copying names of placeholders is no translation, and BLEU rewards it."""
    return " ".join(re.sub(r"%\(\w+\)[a-z]|%[a-z]|\{\w*\}", "X", message).split())


class Words:
    """Pieces of words (byte-pair encoding) as ids."""

    def __init__(self, texts: list[str]) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        self.tokenizer = Tokenizer(models.BPE())
        self.tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        self.tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
        self.tokenizer.train_from_iterator(texts, trainer)

    def ids(self, texts: list[str]) -> Tensor:
        """START, pieces, END, padded: (N, L)."""
        rows = [[START, *self.tokenizer.encode(t).ids[: LONGEST - 2], END] for t in texts]
        longest = max(map(len, rows))
        return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])

    def texts(self, ids: Tensor) -> list[str]:
        """What the pieces say."""
        return self.tokenizer.decode_batch([[n for n in row if n > END] for row in ids.tolist()])

    def pieces(self, ids: Tensor) -> list[str]:
        """One string per id, paddings left out."""
        return [self.tokenizer.id_to_token(n).replace("\u2581", " ").strip() or "·" for n in ids.tolist() if n != PAD]


def nearest(source: str, trained: list[tuple[str, str]]) -> str:
    """The translation of the message that shares most words with `source`."""
    words = set(source.lower().split())

    def likeness(pair: tuple[str, str]) -> float:
        others = set(pair[0].lower().split())
        return len(words & others) / len(words | others)

    return max(trained, key=likeness)[1]


def translate(model: tf.EncoderDecoder, source: Tensor, width: int) -> Tensor:
    """Target ids of a batch, by beams of that width; 0 searches greedily."""
    padding = source == PAD
    memory = model.encode(source, padding)
    ends = {"start": START, "end": END, "max_new": LONGEST}
    if width == 0:
        return tf.greedy(model.decoder, memory, padding, **ends)
    return tf.beam(model.decoder, memory, padding, width=width, **ends)


def draw(model: tf.EncoderDecoder, english: Words, german: Words, source: str, path: Path) -> None:
    """The map of the last cross-attention while `source` is translated."""
    given = english.ids([source])
    found = translate(model, given, 4)[0].tolist()
    target = torch.tensor([[START, *found[: found.index(END) + 1 if END in found else None]]])
    with torch.no_grad(), attn.capture_weights(model) as weights:
        model(given, target[:, :-1])
    last = [w for name, w in weights.items() if name.endswith("multihead_attn")][-1]
    figure = attn.plot_weights(last, german.pieces(target[0, 1:]), english.pieces(given[0]), title=source)
    figure.savefig(path, dpi=130)
    print(f"plot: {path}")


def main() -> None:
    """Trains, translates what was held out, and compares."""
    given = arguments(__doc__)
    import sacrebleu

    data = pairs()
    random.Random(0).shuffle(data)
    several = [pair for pair in data if " " in pair[0]]
    held = several[: len(several) // 10]
    trained = sorted(set(data) - set(held))
    english, german = (Words([pair[n] for pair in trained]) for n in (0, 1))
    config = tf.LayerConfig(96, 4, 192, dropout=0.1, norm_first=True)
    vocabularies = [w.tokenizer.get_vocab_size() for w in (english, german)]
    model = tf.EncoderDecoder(*vocabularies, config, num_layers=2, max_len=LONGEST)
    print(f"{len(trained)} messages to train on, {len(held)} held out")

    def loss_on(batch: list[tuple[str, str]]) -> Tensor:
        source, target = english.ids([e for e, _ in batch]), german.ids([g for _, g in batch])
        scores = model(source, target[:, :-1], source == PAD)
        smoothing = 0.1 if model.training else 0.0
        return F.cross_entropy(
            scores.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD, label_smoothing=smoothing
        )

    by_length = sorted(trained, key=lambda pair: len(pair[0]) + len(pair[1]))

    def loss() -> Tensor:
        start = random.randrange(len(trained) - BATCH + 1)  # neighbours in length: little padding
        return loss_on(by_length[start : start + BATCH])

    random.seed(given.seed)
    steps = 10 if given.quick else 3600
    train(model, loss, steps, given.seconds, rate=3e-3, every=steps // 5, check=lambda: float(loss_on(held)))
    model.eval()

    sources, references = [e for e, _ in held], [g for _, g in held]
    ids = english.ids(sources)
    found = {
        "copy of the source": sources,
        "nearest message": [nearest(s, trained) for s in sources],
        "greedy": german.texts(translate(model, ids, 0)),
        "beam of 4": german.texts(translate(model, ids, 4)),
    }
    for n in range(6):
        print(f"{sources[n]!r} -> {found['beam of 4'][n]!r}  (Django and others: {references[n]!r})")
    draw(model, english, german, SHOWN, given.out / "translation.png")
    scores = {name: sacrebleu.corpus_bleu(texts, [references]).score for name, texts in found.items()}
    print("BLEU on held-out messages: " + ", ".join(f"{name} {score:.1f}" for name, score in scores.items()))


if __name__ == "__main__":
    main()
