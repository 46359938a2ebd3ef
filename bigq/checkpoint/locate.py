"""From what the user calls the weights to the files that hold them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bigq.checkpoint.choose import (
    INDEX_SUFFIX,
    PICKLE_SUFFIXES,
    SAFETENSORS_SUFFIX,
    TRAINING_SUFFIXES,
    Choice,
    choose,
    choose_indexed,
    has_suffix,
    list_folder,
)
from bigq.checkpoint.hub import Remote, Repository, download, parse_repository, survey
from bigq.checkpoint.index import read_index
from bigq.errors import CheckpointError
from bigq.system.text import shortlist

__all__ = ["Location", "locate", "locate_remote", "resolve"]

_FILE_SUFFIXES = (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES, *TRAINING_SUFFIXES)
_FORMS = (
    f"a {SAFETENSORS_SUFFIX} file, a state dict ({', '.join(PICKLE_SUFFIXES)}), an index (*{INDEX_SUFFIX}), "
    "a folder with one of these, or a Hub repository id ('owner/name', 'owner/name/folder', 'owner/name@revision')"
)


@dataclass(frozen=True, kw_only=True)
class Location:
    """The files of a checkpoint, in order, and the file of each tensor as far as an index names it."""

    files: tuple[Path, ...]
    index: Path | None = None
    weight_map: Mapping[str, Path] = field(default_factory=dict, repr=False)


def locate(weights_location: str | os.PathLike[str]) -> Location:
    """Find the files of a checkpoint: a file, an index, a folder or, for a `str` that is no path, a Hub repository.

    A path is taken as it stands: `~` and variables are not expanded.
    """
    if os.fspath(weights_location) == "":  # Path("") would be the working directory
        raise CheckpointError(f"weights_location is empty: expected {_FORMS}")
    path = Path(weights_location)
    if os.path.isdir(path):
        return resolve(path, choose(list_folder(path)))
    if os.path.isfile(path):
        return _locate_file(path)
    if os.path.lexists(path):  # a device, a socket, a link to nowhere
        raise CheckpointError(f"{path} is neither a file nor a folder: expected {_FORMS}")
    if isinstance(weights_location, str) and not has_suffix(weights_location, *_FILE_SUFFIXES, ".json"):
        repository = parse_repository(weights_location)
        if repository is not None:
            return resolve(*download(repository))
    hint = "; `~` is not expanded, use Path.expanduser()" if path.parts[0].startswith("~") else ""
    raise CheckpointError(f"no such file or folder: {path}{hint}; expected {_FORMS}")


def locate_remote(weights_location: str | os.PathLike[str]) -> tuple[Repository, Remote] | None:
    """What the Hub holds under `weights_location`, without weights; None where `locate` finds it on this machine."""
    if not isinstance(weights_location, str) or os.path.lexists(weights_location):
        return None
    if has_suffix(weights_location, *_FILE_SUFFIXES, ".json"):
        return None
    repository = parse_repository(weights_location)
    return None if repository is None else (repository, survey(repository))


def _locate_file(path: Path) -> Location:
    if not has_suffix(path.name, ".json"):
        return Location(files=(path,))  # whatever its name is: its content says what it is
    choice = choose_indexed(list_folder(path.parent), path.name)
    if choice is None:
        foreign = shortlist(sorted(set(read_index(path).values())))
        raise CheckpointError(
            f"the index {path} names files of another kind: {foreign}; expected {', '.join(_FILE_SUFFIXES)}"
        )
    return resolve(path.parent, choice)


def resolve(folder: Path, choice: Choice) -> Location:
    """The files of `choice`, which lie in `folder`."""
    paths = {file: folder / file for file in (*choice.files, *set(choice.weight_map.values()))}
    return Location(
        files=tuple(paths[file] for file in choice.files),
        index=folder / choice.index if choice.index else None,
        weight_map={name: paths[file] for name, file in choice.weight_map.items()},
    )
