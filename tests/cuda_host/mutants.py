"""Mutants of a kernel's text: each barrier and wait deleted, each wait made laxer, and single relations, numbers,
operators and conditions turned."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

from cuda_host import build
from cuda_host.changed import Edit

SYNC = re.compile(r"\b(?:sync_threads|sync_warp|cp_async_commit|cp_async_wait<\d>)\(\);")
WAIT = re.compile(r"cp_async_wait<(\d)>")
RELATION = re.compile(r" (<=?|>=?|==|!=) (?=[\w(-])")
NUMBER = re.compile(r"(?<![\w.<])(\d+)(?![\w.>])")
OPERATOR = re.compile(r" ([-+^&|/%*]) (?=[\w(])")
LOGIC = re.compile(r" (&&|\|\|) ")
EXTREME = re.compile(r"\b(least|most|fmaxf|fminf|min|max)\(")
TURNED = {
    **{"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="},
    **{"+": "-", "-": "+", "^": "+", "&": "|", "|": "&", "/": "*", "%": "/", "*": "+"},
    **{"&&": "||", "||": "&&"},
    **{"least": "most", "most": "least", "fmaxf": "fminf", "fminf": "fmaxf", "min": "max", "max": "min"},
}
NOT_CODE = re.compile(r"^\s*(?:#|//|template\b|static_assert|using\b|struct\b|class\b|namespace\b|enum\b|ATTN_UNROLL)")


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The start and the code of each line that a mutant may change."""
    start = 0
    for line in text.splitlines(keepends=True):
        code = line.split("//")[0]
        if not NOT_CODE.match(line) and "constexpr" not in code and "template " not in code:
            yield start, code
        start += len(line)


def _number(text: str) -> str:
    n = int(text)
    return str(n + 1 if n < 3 else n // 2)


def mutants_of(file: str, limit: int, seed: int = 1) -> list[Edit]:
    """All of synchronisation, and others drawn at random up to `limit`."""
    text = (build.CSRC / "cuda" / file).read_text()
    sync, others = [], []
    for start, code in _lines(text):
        at = lambda m, group=0: (start + m.start(group), start + m.end(group))  # noqa: B023, E731
        sync += [Edit(file, *at(m), "(void)0;") for m in SYNC.finditer(code)]
        sync += [Edit(file, *at(m, 1), str(int(m[1]) + 1)) for m in WAIT.finditer(code)]
        for pattern in (RELATION, OPERATOR, LOGIC, EXTREME):
            others += [Edit(file, *at(m, 1), TURNED[m[1]]) for m in pattern.finditer(code)]
        others += [Edit(file, *at(m, 1), _number(m[1])) for m in NUMBER.finditer(code)]
    random.Random(seed).shuffle(others)
    return sync + others[: max(0, limit - len(sync))]


def shown(edit: Edit) -> str:
    """file:line: 'old' -> 'new' in: the line."""
    path = Path(build.CSRC / "cuda" / edit.file)
    text = path.read_text()
    line = text.count("\n", 0, edit.start) + 1
    whole = text.splitlines()[line - 1].strip()
    return f"{edit.file}:{line}: {text[edit.start : edit.end]!r} -> {edit.new!r} in: {whole}"
