"""Emulated libraries of changed kernels: a change of the text, compiled into as few kernels as show it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cuda_host import build


@dataclass(frozen=True)
class Edit:
    """text[start:end] of a file of csrc/cuda becomes `new`."""

    file: str
    start: int
    end: int
    new: str

    def applied(self, text: str) -> str:
        return text[: self.start] + self.new + text[self.end :]


def edit(file: str, old: str, new: str, after: str = "") -> Edit:
    """The first `old` behind the first `after`. Raises ValueError where the text has moved on."""
    text = (build.CSRC / "cuda" / file).read_text()
    at = text.find(after)
    start = text.find(old, at) if at >= 0 else -1
    if start < 0:
        raise ValueError(
            f"{file} holds no {old!r}" + (f" behind {after!r}" if after else "") + "; bring this up to date"
        )
    return Edit(file, start, start + len(old), new)


@dataclass(frozen=True)
class Unit:
    """A file of csrc/cuda/inst, and which of its instantiations are compiled: those that match. Or one of csrc/cuda."""

    file: str
    chosen: str = ""

    def text(self) -> str:
        if (build.CSRC / "cuda" / self.file).is_file():
            return f'#include "../{self.file}"\n'
        whole = (build.CSRC / "cuda" / "inst" / self.file).read_text()
        return re.sub(r"^template [^;]*;", lambda m: m[0] if re.search(self.chosen, m[0]) else "", whole, flags=re.M)


def copied(folder: Path, edits: Sequence[Edit]) -> Path:
    """A csrc with the edits in it."""
    csrc = folder / "csrc"
    shutil.copytree(build.CSRC / "cuda", csrc / "cuda", ignore=shutil.ignore_patterns("inst"))
    for header in build.CSRC.glob("*.h"):
        shutil.copy(header, csrc)
    for each in edits:
        path = csrc / "cuda" / each.file
        path.write_text(each.applied(path.read_text()))
    return csrc


def library(folder: Path, edits: Sequence[Edit], units: Sequence[Unit], flavour: str = "plain") -> Path:
    """The library of the tree with changed kernels: the linker takes each from the first object that has it. `flavour`
    is that of the units and of the emulator. Raises build.BuildError where the change does not compile."""
    inst = copied(folder, edits) / "cuda" / "inst"
    inst.mkdir()
    source = inst / "units.cu"  # one file: what they include costs more than they do
    source.write_text("".join(unit.text() for unit in units))
    first = build.objects([source], folder / flavour, flavour)
    replaced = {f"cuda_{unit.file}.o" for unit in units}  # functions that are no templates can stand there once
    kernels = [path for path in build.kernel_objects("plain") if path.name not in replaced]
    rest = build.emulator_objects(flavour) + kernels
    return build.link_library([*first, *rest], folder / flavour / build.LIBRARY, flavour)


def sanitizer_libraries() -> list[str]:
    """What a process must load first to load a library with sanitizers."""
    found = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):  # Python itself was built without them
        command = [*build.COMPILER, f"-print-file-name={name}"]
        found.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return found
