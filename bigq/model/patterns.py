"""Patterns: which modules and parameters the patterns in a config match."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from bigq.errors import ConfigError

__all__ = ["match_patterns", "matches"]


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
    """Whether the components of `pattern`, which may be globs, match neighbouring components of `name`."""
    wanted, parts = pattern.split("."), name.split(".")
    return any(
        all(fnmatchcase(part, want) for part, want in zip(parts[start:], wanted, strict=False))
        for start in range(len(parts) - len(wanted) + 1)
    )
