"""`python -m attn explain`: what the planner does with a call that is given as a line."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The line and the backend to force."""
    parser.add_argument(
        "case",
        nargs="+",
        metavar="CASE",
        help="the line of a call as attn prints it, such as: attention cpu float32 head_dim=64 value_dim=64 band=start "
        "causal grad (sizes behind a '|' are ignored)",
    )
    parser.add_argument("--backend", help="force this backend, as use_backend does")


def run(args: argparse.Namespace) -> int:
    """Prints the table of reasons; 1 if no backend runs the call, 2 for a line or a backend that is not understood."""
    from attn.planner import explain_spec
    from attn.spec import AttentionSpec

    try:
        explanation = explain_spec(AttentionSpec.parse(" ".join(args.case).partition("|")[0]), args.backend)
    except ValueError as error:
        print(f"python -m attn explain: {error}", file=sys.stderr)
        return 2
    print(explanation)
    return 0 if explanation.chosen else 1
