"""Text for people: tables in aligned columns, numbers of bytes, and lists of names short enough for an error."""

from collections.abc import Sequence

__all__ = ["bytes_text", "format_table", "itemized", "shortlist"]

_LONGEST = 500  # characters: a name comes from a file, and a header may hold one of 100 MB


def bytes_text(nbytes: float) -> str:
    """A number of bytes in three digits or more: "786 KB", "16.1 GB"; K, M and G are powers of 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if nbytes >= 0.9995 * size:
            scaled = nbytes / size
            return f"{scaled:,.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f} {unit}"
    return f"{nbytes:.0f} bytes"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """One line a row, the first of them the header: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def itemized(problems: Sequence[str], limit: int = 10) -> str:
    """The first problems, each as an item on a line of its own, and how many more there are."""
    more = [f"and {len(problems) - limit} more"] if len(problems) > limit else []
    return "".join(f"\n  - {item}" for item in [*problems[:limit], *more])


def shortlist(names: Sequence[object], limit: int = 10) -> str:
    """Join the first names with commas and count the rest; of a name that is itself too long, the first characters."""
    texts = [str(name) for name in names[:limit]]
    shown = ", ".join(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..." for text in texts)
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
