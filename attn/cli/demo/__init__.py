"""`python -m attn demo`: the main job on real text.

A small GPT and a small encoder are each trained twice from one seed, once as they are with `nn.MultiheadAttention`,
once after `attn.replace`. Losses have to agree; time and memory are shown beside each other.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attn.cli.demo.train import Pair


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the picture goes, and how long it may take."""
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder for the picture (out)")
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer steps: under 40 seconds")


def run(args: argparse.Namespace) -> int:
    """Trains, prints the tables, draws; 1 if losses do not agree or the text is missing."""
    from attn.cli.demo import models, report, text, train

    try:
        corpus = text.corpus()
    except ModuleNotFoundError as error:
        print(f"demo: this Python has no {error.name}. Cure: a full Python, such as Debian's python3", file=sys.stderr)
        return 1
    size = models.QUICK if args.quick else models.FULL
    print(report.introduction(corpus, size), flush=True)
    pairs = []
    for task in (models.gpt_task(corpus, size), models.encoder_task(corpus, size)):
        pair = train.both_ways(task, size)
        print(f"\n{report.section(pair, size)}", flush=True)
        pairs.append(pair)
    agree = all(pair.agrees for pair in pairs)
    print(f"\n{report.verdict(agree)}\n{_picture(args.out, pairs)}")
    return 0 if agree else 1


def _picture(folder: Path, pairs: list[Pair]) -> str:
    """Draws the picture and says where it is, or the cure."""
    try:
        from attn.cli.demo import figure
    except ModuleNotFoundError as error:
        return f"No picture: {error.name} is not installed. Cure: pip install 'attn-kernels[bench]'"
    return f"Loss curves, time and memory: {figure.draw(pairs, folder)}"
