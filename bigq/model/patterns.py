"""Patterns: which modules and parameters the patterns in a config match."""

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache

from bigq.config import REGEX
from bigq.errors import ConfigError

__all__ = ["is_named", "match_patterns", "matches"]


def match_patterns(field: str, patterns: Sequence[str], names: Iterable[str]) -> dict[str, str]:
    """Return {name: pattern} for each of `names` that a pattern matches, directly or through a module around it.

    Args:
        field: the field of the config that has the patterns, for errors.

    Raises:
        ConfigError: a pattern matches none of `names`; the error lists similar names.
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
    """Whether `pattern` matches `name` or a module around it.

    The components of a glob match neighbouring components of a name. A regular expression, "re:" before it, matches a
    whole name.
    """
    if pattern.startswith(REGEX):
        return any(_regex(pattern).fullmatch(found) for found in _with_ancestors(name))
    wanted, parts = pattern.split("."), name.split(".")
    return any(
        all(fnmatchcase(part, want) for part, want in zip(parts[start:], wanted, strict=False))
        for start in range(len(parts) - len(wanted) + 1)
    )


def is_named(pattern: str, name: str) -> bool:
    """Whether `pattern` names `name` itself: it matches up to the last component, and does not end with a wildcard."""
    if pattern.endswith("*"):
        return False
    if pattern.startswith(REGEX):
        return _regex(pattern).fullmatch(name) is not None
    wanted, parts = pattern.split("."), name.split(".")
    return len(parts) >= len(wanted) and all(map(fnmatchcase, parts[-len(wanted) :], wanted))


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.removeprefix(REGEX))


def _with_ancestors(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(len(parts), 0, -1))
