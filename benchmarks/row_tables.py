"""Committed tables of compiled kernels: a JSON file with one row a line, so that a change shows as the lines it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar


class Row(Protocol):
    """A NamedTuple of numbers and words."""

    @property
    def key(self) -> str:
        """What identifies the row in its table."""

    def _asdict(self) -> dict[str, Any]: ...


R = TypeVar("R", bound=Row)


def load(kind: Callable[..., R], path: Path) -> dict[str, R]:
    """The rows by key; none where there is no file."""
    if not path.is_file():
        return {}
    rows = (kind(**fields) for fields in json.loads(path.read_text())["rows"])
    return {row.key: row for row in rows}


def save(rows: Mapping[str, Row], path: Path, **made_by: str) -> None:
    """Write the rows, behind the name and version of what made them; a run that is cut off leaves the old file."""
    head = "".join(f"{json.dumps(name)}: {json.dumps(version)}, " for name, version in made_by.items())
    lines = ",\n".join("  " + json.dumps(rows[key]._asdict()) for key in sorted(rows))
    path.parent.mkdir(exist_ok=True)
    whole = path.with_suffix(".new")
    whole.write_text(f'{{{head}"rows": [\n{lines}\n]}}\n')
    whole.replace(path)


def cell(spent: list[tuple[int, int]]) -> str:
    """(registers, spills) of each kernel in the cell of a short table: `218`, or `242/6 · 237`."""
    return " · ".join(f"{registers}/{spills}" if spills else f"{registers}" for registers, spills in spent)
