"""The commands of `python -m attn`.

Nothing here imports torch: arguments are parsed first, and `info` has to work where torch does not. Each command is one
module with `add_arguments(parser)` and `run(args) -> exit status`: 0 fine, 1 a check failed, 2 bad usage.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "info": "what is installed, which backends work here, why the others do not, and the cure",
    "demo": "swap the module into two models, train them on real text, compare losses, time and memory",
    "verify": "every backend against the reference on this machine, a table; a case line replays one case",
    "bench": "speed and memory beside PyTorch's kernels and installed libraries, each checked before it is timed",
    "profile": "where the time of a call or of a function goes: trace, kernels, roofline, the command for ncu",
    "explain": "which backend runs a call, given as a line, and why each other one does not",
}


def parser() -> argparse.ArgumentParser:
    """The parser for every command."""
    top = argparse.ArgumentParser(prog="python -m attn", description="Attention kernels for PyTorch.")
    commands = top.add_subparsers(dest="command", metavar="command", required=True)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        _module(name).add_arguments(sub)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    args = parser().parse_args(argv)
    try:
        status: int = _module(args.command).run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader (`| head`) went away; point stdout elsewhere so that the interpreter's own flush stays quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _module(command: str):  # type: ignore[no-untyped-def]
    return importlib.import_module(f"attn.cli.{command}")
