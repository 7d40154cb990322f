"""What is remembered between processes: small JSON files in the user's cache folder, for the user alone to read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def path(name: str) -> Path:
    """Where `name` lies: under XDG_CACHE_HOME, else ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "attn" / name


def read(name: str) -> dict[str, Any]:
    """The object in the file; {} where it is not there or holds something else."""
    try:
        found = json.loads(path(name).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(name: str, content: dict[str, Any]) -> bool:
    """Replace the file at once, so that no reader sees half of it; False where the folder cannot be written."""
    file = path(name)
    beside = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            json.dump(content, out, indent=0)
        beside.replace(file)
    except OSError:
        return False
    return True
