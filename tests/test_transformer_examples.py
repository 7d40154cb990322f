"""The examples run: a few steps each, a plot, and the learned figure beside its baseline as the last line."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {  # the packages that it needs, and its last line
    "gpt": ((), r"bits per held-out character: GPT \d\.\d{3}, bigrams 3\.\d{3}"),
    "bert": ((), r"accuracy at \d+ chosen characters: BERT 0\.\d{3}, most frequent 0\.\d{3}"),
    "rnn": ((), r"bigrams: 3\.\d{3} bits per held-out character"),
    "multimodal": (
        ("sklearn",),
        r"names spelled right, of 360 held-out digits: cross-attention \d\.\d{3}, most frequent 0\.\d{3}, "
        r"logistic regression 0\.9\d{2}",
    ),
    "translation": (
        ("django", "sacrebleu", "tokenizers"),
        r"BLEU on held-out messages: copy of the source [\d.]+, nearest message [\d.]+, greedy [\d.]+, "
        r"beam of 4 [\d.]+",
    ),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="the source tree is not here"),
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    needed, last = EXAMPLES[name]
    for package in ("matplotlib", *needed):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"pip install -e '.[examples]' runs this example: {package} is missing")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", "--quick", "--out", tmp_path],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(last, done.stdout.splitlines()[-1]), done.stdout[-500:]
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert len(re.findall(r"held out \d+\.\d{3}", done.stdout)) >= 4


def test_examples_are_short() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) < 200, path.name
