"""What the documents claim: snippets run, links lead somewhere, every public name is described."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import re
import runpy
import shlex
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attn
from attn.backends import load
from attn.benchmarks import work
from attn.cli import COMMANDS, parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "csrc" / "README.md"]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "attn").rglob("*.py")
    if ">>> " in path.read_text()
)

LIBRARY_OF = {"integrations.md": "transformers"}
"""What the snippets of a page need beyond this package."""

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="the source tree is not here")


def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_snippets_of_the_readme_run(capsys: pytest.CaptureFixture[str]) -> None:
    namespace = {"model": nn.TransformerEncoderLayer(8, 2, batch_first=True)}
    snippets = re.findall(r"```python\n(.*?)```", readme(), re.DOTALL)
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), namespace)
    assert len(snippets) >= 3
    assert "runs this call" in capsys.readouterr().out
    assert isinstance(namespace["model"], nn.TransformerEncoder)


def pages_with_snippets() -> Iterator[Any]:
    """Those that need another library are slow: its import takes long."""
    for page in sorted(ROOT.glob("docs/**/*.md")):
        yield pytest.param(page, id=page.name, marks=[pytest.mark.slow] if page.name in LIBRARY_OF else [])


@pytest.mark.parametrize("page", pages_with_snippets())
def test_snippets_of_the_documents_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In order, in one namespace; a text block right after a snippet is what it prints."""
    if library := LIBRARY_OF.get(page.name):
        pytest.importorskip(library)
    namespace: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", page.read_text(), re.DOTALL)
    for snippet, printed in blocks:
        capsys.readouterr()
        exec(compile(snippet, page.name, "exec"), namespace)
        said = capsys.readouterr().out
        assert not printed or said == printed


def test_commands_of_the_documents_are_understood() -> None:
    """What stands in shell blocks is parsed, not run: options, and the lines of works."""
    blocks = [b for page in PAGES for b in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)]
    lines = re.findall(r"^\S*python -m attn(?:\.benchmarks\.(\w+))?( .*)?$", "\n".join(blocks), re.MULTILINE)
    assert len(lines) >= 8
    for program, rest in lines:
        words = shlex.split(rest, comments=True)
        if program:
            assert importlib.util.find_spec(f"attn.benchmarks.{program}") is not None, program
            continue
        args = parser().parse_args(words)
        if args.command in ("bench", "profile"):
            target = " ".join(args.work if args.command == "bench" else args.target)
            assert not target or str(work.parse(target)) == target


def test_every_document_is_in_the_site() -> None:
    site = (ROOT / "mkdocs.yml").read_text()
    assert set(re.findall(r"(\S+\.md)", site)) == {path.name for path in ROOT.glob("docs/*.md")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert missing == []


def test_every_public_name_is_described() -> None:
    text = readme()
    for name in attn.__all__:
        assert f"attn.{name}" in text, name
        described = inspect.getdoc(getattr(attn, name))
        assert described, name


def test_masks_are_listed() -> None:
    made = [
        n for n, f in vars(attn.masks).items() if inspect.isfunction(f) and f.__annotations__.get("return") == "Mask"
    ]
    public = [n for n in made if not n.startswith("_")]
    assert set(public) >= {"causal", "padding"}
    for name in public:
        assert f"`{name}`" in readme(), name


def test_commands_are_listed() -> None:
    assert set(re.findall(r"python -m attn (\w+)", readme())) == set(COMMANDS)


def test_every_backend_has_its_row() -> None:
    for name in attn.planner.names():
        assert f"\n| `{name}` |" in readme(), name


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {t for page in PAGES for t in re.findall(r"^make ([a-z]+)", page.read_text(), re.MULTILINE)}
    assert {"demo", "test"} <= named <= targets


def test_platforms_are_tested_or_marked() -> None:
    section = readme().partition("## Platforms")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?!platform|---)(.+?) \| (.+?) \|$", section, re.MULTILINE)
    assert len(rows) >= 6
    assert all(status.startswith(("tested", "not run")) for _, status in rows)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_example_program(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "replace_attention.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "largest difference" in said
    assert said.splitlines()[-1] == "restored: torch.nn.modules.activation.MultiheadAttention"


@pytest.mark.parametrize(
    ("backend", "method", "grad"),
    [("sdpa", "call", False), ("sdpa", "call", True), ("reference", "infer", False), ("reference", "forward", True)],
)
def test_call_path_is_short(monkeypatch: pytest.MonkeyPatch, backend: str, method: str, grad: bool) -> None:
    """From the public call to the backend's function: at most 6 functions, in at most 4 files with the backend's."""
    paths = []
    kind = type(load(backend))
    real = getattr(kind, method)

    def watched(*args: object, **kwargs: object) -> object:
        paths.append(traceback.extract_stack()[:-1])
        return real(*args, **kwargs)

    monkeypatch.setattr(kind, method, watched)
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=grad) for _ in range(3))
    attn.scaled_dot_product_attention(q, k, v, backend=backend)
    home = str(Path(attn.__file__).parent)
    ours = [frame for frame in paths[0] if frame.filename.startswith(home)]
    assert len(ours) <= 6, [frame.name for frame in ours]
    assert len({frame.filename for frame in ours} | {inspect.getfile(kind)}) <= 4
