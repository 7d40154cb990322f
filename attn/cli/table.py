"""Tables in plain text."""

from collections.abc import Sequence


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, indent: str = "  ") -> str:
    """Rows under headers, columns padded to one width; the first `left` columns are aligned left, the rest right."""
    lines = [list(headers), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]

    def joined(line: Sequence[str]) -> str:
        cells = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        return (indent + "  ".join(cells)).rstrip()

    return "\n".join([joined(lines[0]), indent + "  ".join("-" * w for w in widths), *map(joined, lines[1:])])
