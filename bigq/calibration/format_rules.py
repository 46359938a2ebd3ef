"""format_rules: a format for each weight, written as few rules of a config."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from bigq.config import REGEX, QuantizationConfig, Rules
from bigq.formats import Format
from bigq.model.patterns import matches

__all__ = ["with_formats"]

Formats = Mapping[str, Format | None]


def with_formats(
    config: QuantizationConfig, formats: Formats, is_right: Callable[[QuantizationConfig], bool]
) -> QuantizationConfig:
    """`config` with rules that give each weight of `formats` its format, after the rules that it has.

    The format of most weights becomes that of the config. Layers that differ by their numbers alone share a rule: a
    name ("v_proj") or a glob if all of them have one format, and otherwise a regular expression that lists the numbers.

    Args:
        formats: {name of a weight: its format; None: kept}.
        is_right: whether a config does what `formats` say, and changes nothing else. A rule may match more than it is
            meant to, so the first of several ways to write the rules that is right is taken.
    """
    counts = Counter(formats.values())
    own = config.weight_format()  # taken where it is as common as another one
    default = max(counts, key=lambda weight_format: (counts[weight_format], weight_format == own))
    for rules in _ways(formats, default):
        found = replace(config, format=default, rules=(*config.ordered_rules(), *rules))
        if is_right(found):
            return found
    raise AssertionError("rules of whole names give each weight its format")


def _ways(formats: Formats, default: Format | None) -> Iterator[Rules]:
    """Rules for `formats`: of modules as short as they can be, of parameters, and of each parameter by its name."""
    modules = {name.removesuffix(".weight"): weight_format for name, weight_format in formats.items()}
    for named in [modules, formats] if len(modules) == len(formats) else [formats]:
        yield tuple(_rules(named, default))
    exact = {f"{REGEX}{re.escape(name)}": weight_format for name, weight_format in formats.items()}
    yield tuple((pattern, weight_format) for pattern, weight_format in exact.items() if weight_format != default)


def _rules(formats: Formats, default: Format | None) -> Iterator[tuple[str, Format | None]]:
    """For each kind of layer: its exceptions as lists of numbers, then the format that most of its layers have."""
    kinds: dict[str, dict[str, Format | None]] = {}
    for name, weight_format in formats.items():
        kinds.setdefault(_NUMBER.sub("*", name), {})[name] = weight_format
    for kind, own in kinds.items():
        counts = Counter(own.values())
        common = max(counts, key=lambda found, counts=counts: (counts[found], found == default))  # type: ignore[misc]
        for weight_format in counts:
            if weight_format != common:
                yield _listed([name for name, found in own.items() if found == weight_format]), weight_format
        if common != default and (len(own) == 1 or kind.endswith("*")):  # a glob of numbers alone says too much
            yield _listed([name for name, found in own.items() if found == common]), common
        elif common != default:
            yield _shortest(kind, own, formats), common


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole component of a name


def _listed(names: Sequence[str]) -> str:
    """A regular expression of names that differ in their numbers alone; of one name, the name."""
    if len(names) == 1:
        return names[0]
    start, end = _ends(names)
    middles = "|".join(re.escape(name[start : len(name) - end]) for name in names)
    return f"{REGEX}{re.escape(names[0][:start])}({middles}){re.escape(names[0][len(names[0]) - end :])}"


def _ends(names: Sequence[str]) -> tuple[int, int]:
    """How many characters all names share at their start and at their end, up to whole components."""
    parts = [name.split(".") for name in names]
    columns = list(zip(*parts, strict=True))
    differing = [place for place, column in enumerate(columns) if len(set(column)) > 1]
    first, last = differing[0], differing[-1]
    return len(".".join([*parts[0][:first], ""])), len(".".join(["", *parts[0][last + 1 :]]))


def _shortest(kind: str, own: Mapping[str, object], formats: Formats) -> str:
    """The shortest end of `kind`, by components, that matches none but its `own` weights."""
    parts = kind.split(".")
    for start in range(len(parts) - 1, 0, -1):
        pattern = ".".join(parts[start:])
        if "*" in (parts[start], parts[-1]) or any(matches(pattern, name) for name in formats if name not in own):
            continue
        return pattern
    return kind
