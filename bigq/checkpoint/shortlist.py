"""A list of names, short enough for an error message."""

from collections.abc import Sequence

__all__ = ["shortlist"]


def shortlist(names: Sequence[object], limit: int = 10) -> str:
    """Join the first names with commas and count the rest."""
    shown = ", ".join(str(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
