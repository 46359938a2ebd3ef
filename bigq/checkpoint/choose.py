"""Which files of a folder, or of a Hub repository, are the checkpoint."""

import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from bigq.checkpoint.index import read_index
from bigq.errors import CheckpointError
from bigq.system.text import shortlist

__all__ = [
    "INDEX_SUFFIX",
    "PICKLE_SUFFIXES",
    "SAFETENSORS_SUFFIX",
    "TRAINING_SUFFIXES",
    "Choice",
    "Listing",
    "choose",
    "choose_indexed",
    "has_suffix",
    "holds_weights",
    "list_folder",
]

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
TRAINING_SUFFIXES = (".ckpt", ".pth.tar", ".pt.tar")  # pickles of training scripts, as a rule with more than weights
INDEX_SUFFIX = ".index.json"

# A variant has its name before the last suffix: m-00001-of-00002.fp16.safetensors, m.safetensors.index.fp16.json.
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<total>\d+)(?P<suffix>(\.\w+)+)")
_INDEX = re.compile(r".+\.index(\.\w+)?\.json")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files of one place; `contains` also knows those in its subfolders."""

    place: str
    names: Collection[str]
    contains: Callable[[str], bool]
    read_index: Callable[[str], Mapping[str, str]]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The names of a checkpoint's files, in order, and what its index says, if it has one.

    `proven` is False for several files that nothing but their lying side by side declares to be one checkpoint.
    """

    files: tuple[str, ...]
    index: str | None = None
    weight_map: Mapping[str, str] = field(default_factory=dict, repr=False)
    proven: bool = True


@dataclass(frozen=True, kw_only=True)
class _Kind:
    suffixes: tuple[str, ...]
    standard_name: str | None

    @property
    def standard_index(self) -> str | None:
        return self.standard_name and self.standard_name + INDEX_SUFFIX


# In order of preference: safetensors can be checked without unpickling anything.
_KINDS = (
    _Kind(suffixes=(SAFETENSORS_SUFFIX,), standard_name="model.safetensors"),
    _Kind(suffixes=PICKLE_SUFFIXES, standard_name="pytorch_model.bin"),
    _Kind(suffixes=TRAINING_SUFFIXES, standard_name=None),
)


def has_suffix(name: str, *suffixes: str) -> bool:
    """Whether a file's name ends with one of `suffixes`, in letters of either case."""
    return name.lower().endswith(suffixes)


def holds_weights(name: str) -> bool:
    """Whether a file's name is one of a file of weights."""
    return any(has_suffix(name, *kind.suffixes) for kind in _KINDS)


def list_folder(folder: Path) -> Listing:
    """List a local folder."""
    try:
        names = [path.name for path in folder.iterdir() if path.is_file()]
    except OSError as error:
        raise CheckpointError(f"cannot list the folder {folder}: {error}") from error
    return Listing(
        place=f"the folder {folder}",
        names=names,
        contains=lambda name: os.path.isfile(folder / name),
        read_index=lambda name: read_index(folder / name),
    )


def choose(listing: Listing) -> Choice:
    """Choose the checkpoint among the files of a place.

    Safetensors come before pickles. Within a kind, the standard single file comes first, then an index whose shards are
    all present, then files that need no index: a single one of any name, complete `-00001-of-0000N` sets, or, for
    safetensors, several files that the reader will find disjoint. An incomplete set is never taken for a whole one.
    """
    names = sorted(name for name in listing.names if "/" not in name and not name.startswith("."))
    problems: list[str] = []

    @cache  # an index is read only if nothing preferable is there: on the Hub, reading it is a download
    def open_index(name: str) -> Choice | None:
        try:
            return choose_indexed(listing, name)
        except CheckpointError as error:
            problems.append(str(error))
            return None

    for kind in _KINDS:
        if kind.standard_name and kind.standard_name in names:
            return Choice(files=(kind.standard_name,))
        if kind.standard_index and kind.standard_index in names and (choice := open_index(kind.standard_index)):
            return choice
        opened = [open_index(name) for name in names if _INDEX.fullmatch(name)]
        if choice := _only(listing, [choice for choice in opened if choice and _kind_of(choice) is kind]):
            return choice
        if problems:
            continue  # the files that a broken index speaks of are not to be guessed at
        files = [name for name in names if has_suffix(name, *kind.suffixes)]
        problems += _missing_shards(files)
        if files and not problems:
            return _choose_unindexed(listing, kind, files)
    if problems:
        raise CheckpointError(f"{listing.place} holds no complete checkpoint: " + "; ".join(problems))
    raise CheckpointError(
        f"{listing.place} holds no checkpoint: expected a {SAFETENSORS_SUFFIX} file, a state dict "
        f"({', '.join(PICKLE_SUFFIXES)}) or an index (*{INDEX_SUFFIX}); "
        f"found {shortlist(names, limit=20) or 'no files'}"
    )


def choose_indexed(listing: Listing, index: str) -> Choice | None:
    """The shards that an index names, or None if they are another framework's."""
    weight_map = listing.read_index(index)
    files = sorted(set(weight_map.values()))
    if not all(map(holds_weights, files)):
        return None
    missing = [file for file in files if not listing.contains(file)]
    if missing:
        raise CheckpointError(
            f"the index {index} names {len(missing)} missing file(s): {shortlist(missing)}; put them beside it"
        )
    return Choice(files=tuple(files), index=index, weight_map=weight_map)


def _only(listing: Listing, choices: list[Choice]) -> Choice | None:
    if len(choices) > 1:
        indexes = shortlist([choice.index for choice in choices if choice.index])
        raise CheckpointError(
            f"{listing.place} holds several complete checkpoints: {indexes}; pass the path of the index to load"
        )
    return choices[0] if choices else None


def _kind_of(choice: Choice) -> _Kind:
    """The least preferred kind of its files."""
    return next(kind for kind in reversed(_KINDS) if any(has_suffix(file, *kind.suffixes) for file in choice.files))


def _choose_unindexed(listing: Listing, kind: _Kind, files: list[str]) -> Choice:
    sets = {match.group("stem", "total", "suffix") if (match := _SHARD.fullmatch(file)) else file for file in files}
    if len(sets) > 1 and SAFETENSORS_SUFFIX not in kind.suffixes:
        # To find pickles disjoint would be to unpickle them all.
        raise CheckpointError(
            f"{listing.place} holds several state dicts and no index: {shortlist(files)}; "
            "pass the path of the file to load"
        )
    return Choice(files=tuple(files), proven=len(sets) == 1)


def _missing_shards(files: list[str]) -> list[str]:
    """What the files named like shards say is not there."""
    sets: dict[tuple[str | Any, ...], dict[int, str]] = {}
    for file in files:
        if match := _SHARD.fullmatch(file):
            sets.setdefault(match.group("stem", "total", "suffix"), {})[int(match["number"])] = file
    problems = []
    for (stem, total, suffix), shards in sets.items():
        first = 0 if 0 in shards else 1
        expected = range(first, first + int(total))
        missing = int(total) - sum(number in expected for number in shards)
        if missing:
            number = next(number for number in expected if number not in shards)
            example = f"{stem}-{number:0{len(total)}}-of-{total}{suffix}"
            problems.append(f"{missing} of the {int(total)} shards of {stem}{suffix} are missing, first {example}")
    return problems
