"""Patterns: the names of modules and parameters that a user's list of them stands for."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from bigq.errors import ConfigError

__all__ = ["match_patterns", "matches"]


def match_patterns(field: str, patterns: Sequence[str], names: Iterable[str]) -> dict[str, str]:
    """{name: pattern} for each of `names` that a pattern matches: itself, or an ancestor of it, on component borders.

    Raises:
        ConfigError: a pattern that matches none of `names`; it lists near ones.
    """
    matched: dict[str, str] = {}
    names = list(names) if patterns else []
    for pattern in patterns:
        hits = [name for name in names if matches(pattern, name)]
        if not hits:
            parts = {part for name in names for part in name.split(".")}
            near = get_close_matches(pattern, [*names, *sorted(parts)], n=5, cutoff=0.5)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise ConfigError(f"{field} {pattern!r} matches no module or parameter of the model{hint}")
        for name in hits:
            matched.setdefault(name, pattern)
    return matched


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` stands for `name` or an ancestor of it: a glob of neighbouring components."""
    wanted, parts = pattern.split("."), name.split(".")
    return any(
        all(fnmatchcase(part, want) for part, want in zip(parts[start:], wanted, strict=False))
        for start in range(len(parts) - len(wanted) + 1)
    )
