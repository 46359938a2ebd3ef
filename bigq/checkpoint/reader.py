"""A checkpoint: all its tensors described and validated, then read one at a time."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from bigq.checkpoint.content import is_safetensors
from bigq.checkpoint.foreign import refuse_foreign
from bigq.checkpoint.local_file import LocalFile
from bigq.checkpoint.locate import Location, locate, locate_remote, resolve
from bigq.checkpoint.pickle_file import PickleFile
from bigq.checkpoint.remote_file import RemoteFile
from bigq.checkpoint.safetensors_file import SafetensorsFile
from bigq.checkpoint.source import StoredTensor, read_tensor, refuse_unknown
from bigq.errors import CheckpointError
from bigq.system.files import FileIdentity
from bigq.system.text import itemized, shortlist

__all__ = ["Checkpoint"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """The files of a checkpoint and, in the order in which they are stored, its tensors; a Source.

    It keeps no file open, so it can be shared between threads: every `read` opens the files it needs. `sources` holds
    the bytes of each file, by what errors call the place of its tensors; `extra_states` the objects other than tensors
    that modules have put into state dicts.
    """

    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    sources: Mapping[str, LocalFile | RemoteFile] = field(repr=False)
    extra_states: Mapping[str, object] = field(default_factory=dict, repr=False)
    in_place = False

    @classmethod
    def open(cls, weights_location: str | os.PathLike[str], *, strict: bool = True) -> "Checkpoint":
        """Find a checkpoint, read the headers of all its files and check that they agree.

        Accepts a file, an index, a folder or a Hub repository id, and raises one `CheckpointError` that says what is
        wrong. No tensor is read, except from pickles in the format from before torch 1.6. `strict` also refuses a
        state dict that holds anything beside tensors.
        """
        return cls._of(locate(weights_location), str(weights_location), partial(_describe, strict=strict))

    @classmethod
    def open_headers(
        cls, weights_location: str | os.PathLike[str], *, strict: bool = True, refuse: bool = True
    ) -> "Checkpoint":
        """Open a checkpoint as `open` does, but download no weights: of a Hub repository, the headers are read there.

        Each of its tensors that is read then is a request of its own, so only small ones should be. `refuse=False` also
        opens what another library has quantized, and adapters.
        """
        found = locate_remote(weights_location)
        if found is None:
            location = locate(weights_location)
            return cls._of(location, str(weights_location), partial(_describe, strict=strict), refuse=refuse)
        repository, remote = found
        location = resolve(remote.folder, remote.choice)
        names = {remote.folder / name: name for name in remote.choice.files}

        def describe(path: Path) -> _Described:
            if path.is_file():  # the cache has it
                return _describe(path, strict)
            file = RemoteFile(repository, names[path])
            return _Described(file, file.describe(), {})

        return cls._of(location, str(weights_location), describe, refuse=refuse)

    @classmethod
    def open_files(cls, files: Sequence[Path], *, strict: bool = True) -> "Checkpoint":
        """Open a checkpoint of these files, as `open` opens those that it has found."""
        location = Location(files=tuple(files))
        return cls._of(location, ", ".join(map(str, files)), partial(_describe, strict=strict))

    @classmethod
    def _of(
        cls, location: Location, title: str, describe: "Callable[[Path], _Described]", *, refuse: bool = True
    ) -> "Checkpoint":
        described: dict[Path, list[StoredTensor]] = {}
        sources: dict[str, LocalFile | RemoteFile] = {}
        extra_states: dict[str, object] = {}
        errors: list[CheckpointError] = []
        for path in location.files:
            try:
                source, described[path], states = describe(path)
                extra_states |= states
                sources.update((stored.where, source) for stored in described[path])
            except CheckpointError as error:
                errors.append(error)
        tensors, problems = _merge(location, described)
        if len(errors) == 1 and not problems:
            raise errors[0]
        problems = [*map(str, errors), *problems]
        if problems:
            raise CheckpointError(f"cannot open the checkpoint {title}:{itemized(problems)}")
        if refuse:
            refuse_foreign((location.index or location.files[0]).parent, tensors)
        return cls(
            files=location.files,
            tensors=MappingProxyType(tensors),
            sources=MappingProxyType(sources),
            extra_states=MappingProxyType(extra_states),
        )

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def check(self) -> None:
        """Every tensor of a file holds numbers."""

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the named tensors in file order, whatever the order of `names`.

        They are CPU tensors and may be views of a memory map: copy what must outlive the next step, and do not write
        to them. A file is opened once and closed before the next one; disjoint `names` can be read by several threads.
        """
        refuse_unknown(names, self.tensors, f"the checkpoint {self.files[0].parent}")
        return self._read(sorted(set(names), key=self._positions.__getitem__))

    def get(self, name: str) -> Tensor:
        """Read one tensor into memory of its own. For more than a few, `read` opens each file once."""
        ((_, tensor),) = self.read([name])
        return tensor.clone()

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: position for position, name in enumerate(self.tensors)}

    def _read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        for where, group in groupby(names, key=lambda name: self.tensors[name].where):
            source = self.sources[where]
            if isinstance(source, RemoteFile):
                yield from ((name, read_tensor(self.tensors[name])) for name in group)
                continue
            _check_unchanged(source)
            with _open(source.path) as file:
                for name in group:
                    _check_unchanged(source)  # to touch a map beyond the end of its file kills the process
                    yield name, self._checked(file.read(name), self.tensors[name])

    @staticmethod
    def _checked(tensor: Tensor, info: StoredTensor) -> Tensor:
        if tensor.shape != info.shape or tensor.dtype != info.dtype:
            raise CheckpointError(
                f"{info.where} changed after it was opened: tensor {info.name!r} was {info.dtype} {tuple(info.shape)} "
                f"and now is {tensor.dtype} {tuple(tensor.shape)}; open the checkpoint again"
            )
        return tensor


class _Described(NamedTuple):
    """The bytes of a file, its tensors, and the objects other than tensors that modules have put into it."""

    source: LocalFile | RemoteFile
    tensors: list[StoredTensor]
    extra_states: Mapping[str, object]


def _describe(path: Path, strict: bool) -> _Described:
    """Describe a file on this machine; `strict` refuses a state dict that holds anything beside tensors."""
    found = _stat(path)
    source = LocalFile(path, found.st_size, FileIdentity.of(found))
    with _open(path) as file:
        extra_states: Mapping[str, object] = {}
        if isinstance(file, PickleFile):
            extra_states = file.extra_states
            if strict and file.others:
                raise CheckpointError(
                    f"{path} is not a dict of names and tensors alone: {shortlist(file.others)}; "
                    "strict=False ignores what is no tensor"
                )
        return _Described(source, file.describe(source), extra_states)


def _open(path: Path) -> SafetensorsFile | PickleFile:
    return SafetensorsFile(path) if is_safetensors(path) else PickleFile(path)


def _check_unchanged(source: LocalFile) -> None:
    found = _stat(source.path)
    if (found.st_size, FileIdentity.of(found)) != (source.nbytes, source.identity):
        raise CheckpointError(
            f"{source.path} changed after it was opened: it had {source.nbytes} bytes and now has {found.st_size}, "
            "or is another file; open the checkpoint again"
        )


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise CheckpointError(f"cannot open {path}: {error}") from error


def _merge(
    location: Location, described: Mapping[Path, list[StoredTensor]]
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Put the tensors of all files together; return also what the files and the index disagree about."""
    tensors: dict[str, StoredTensor] = {}
    duplicates: dict[tuple[str, Path], list[str]] = {}
    for path, infos in described.items():
        for info in infos:
            if location.weight_map.get(info.name, path) != path:
                continue  # the index means the tensor of this name in another file
            if info.name in tensors:
                duplicates.setdefault((tensors[info.name].where, path), []).append(info.name)
            else:
                tensors[info.name] = info
    absent: dict[Path, list[str]] = {}
    for name, path in location.weight_map.items():
        if name not in tensors and path in described:
            absent.setdefault(path, []).append(name)

    problems = [
        f"{len(names)} tensor(s) are both in {first} and in {second}: {shortlist(names)}; "
        "pass the file to load, or an index"
        for (first, second), names in duplicates.items()
    ]
    problems += [
        f"the index {location.index} names {len(names)} tensor(s) that {path} does not hold: {shortlist(names)}"
        for path, names in absent.items()
    ]
    return tensors, problems
