"""mismatch: say in one error how a checkpoint and a model differ, and what may be the cause."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import nn

__all__ = ["SHOWN", "describe_mismatch", "listed"]

SHOWN = 10  # of each kind: a checkpoint of another model has thousands


def listed(lines: Sequence[str]) -> str:
    """The first `lines` of an error, and how many more there are."""
    more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join([*lines[:SHOWN], *more])


def describe_mismatch(
    model: nn.Module,
    *,
    found: int,
    missing: Mapping[str, str],
    misfits: Sequence[str],
    unexpected: Mapping[str, str],
    strict: bool,
) -> str | None:
    """The words of an error about a checkpoint that does not fit `model`; None if it does.

    Args:
        found: how many names of the model the checkpoint holds.
        missing, unexpected: a line for each name that only the model and that only the checkpoint has.
        misfits: a line for each tensor of another shape or kind of number.
        strict: whether the unexpected ones count.
    """
    sections = [("missing from the checkpoint", [*missing.values()]), ("of the wrong shape or kind", misfits)]
    if strict:
        sections.append(("unexpected (strict=False ignores them)", [*unexpected.values()]))
    lines = [f"{len(entries)} {title}:\n{listed(entries)}" for title, entries in sections if entries]
    if not lines:
        return None
    hint = _hint(model, missing, misfits, unexpected)
    total = found + len(missing)
    question = ": another model's checkpoint?" if not found and not hint else ""
    head = f"the checkpoint does not fit {type(model).__name__}: {found} of {total} names match{question}"
    return "\n".join([head, *lines, *([f"hint: {hint}"] if hint else [])])


def _hint(
    model: nn.Module, missing: Collection[str], misfits: Collection[str], unexpected: Collection[str]
) -> str | None:
    tied: Collection[str] = (
        getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", ()) or ()
    )
    if callable(getattr(model, "tie_weights", None)) and any(re.search(key, name) for key in tied for name in missing):
        return "model.tie_weights() before the load ties some of the missing ones to tensors that the checkpoint holds"
    if unexpected and not missing and not misfits:
        return "all that the model needs is there: a checkpoint of a model that has more, such as a head"
    for longer, shorter, what in ((unexpected, missing, "the checkpoint's"), (missing, unexpected, "the model's")):
        added = _addition(longer, shorter)
        if added is not None:
            verb, part = added
            return f"{what} names {verb} {part!r} and the other's do not"
    return None


def _addition(longer: Collection[str], shorter: Collection[str]) -> tuple[str, str] | None:
    """What most of the names that are `longer` have more than the `shorter` ones: ("begin with" or "contain", part)."""
    others, votes = set(shorter), Counter[tuple[str, str]]()
    for name in longer:
        votes.update({(verb, part) for verb, part, rest in _shortened(name) if rest in others})
    for found, count in votes.most_common(1):
        if 2 * count >= min(len(longer), len(shorter)):
            return found
    return None


def _shortened(name: str) -> Iterator[tuple[str, str, str]]:
    """(verb, part, `name` without the part): without its first components, and without one component everywhere."""
    parts = name.split(".")
    for start in range(1, len(parts)):
        yield "begin with", f"{'.'.join(parts[:start])}.", ".".join(parts[start:])
    for part in dict.fromkeys(parts[1:]):
        yield "contain", f"{part}.", ".".join(other for other in parts if other != part)
