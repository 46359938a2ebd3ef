"""OffloadSpace: the memory of offloaded tensors, pinned or in a file, reserved before the first one arrives.

An unnamed file: no other model or process can read it half-written, and the system frees it with the last tensor,
however the process ends. Its space is reserved, so a full disk is an error before any work. What a checkpoint already
holds as needed stays there: its tensors are copy-on-write maps, so no edit reaches the file.
"""

import mmap
import os
import secrets
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import IO, Any
from weakref import ref

import torch
from torch import Tensor

from bigq.errors import CheckpointError, PlacementError
from bigq.formats import TensorSpec
from bigq.system.files import FileIdentity, open_unchanged, read_into
from bigq.system.internals import version_of
from bigq.system.memory import ALIGNMENT, align, memory_of
from bigq.system.pinned_memory import PinnedMemory

__all__ = [
    "CheckpointMap",
    "FileMap",
    "OffloadSpace",
    "PinnedMap",
    "is_edited",
    "is_file_backed",
    "mapping_of",
    "read_stored",
    "refuse_cut_short",
]

_MAP_NORESERVE = 0x4000  # Linux: a private map may be larger than RAM and swap; nothing writes to most of it
_NO_SECOND_DESCRIPTOR: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}  # of a map's own
_MAPS: dict[int, tuple["ref[mmap.mmap]", range]] = {}  # each mapping and its addresses, by its first one


class PinnedMap(PinnedMemory):
    """Pinned memory that copies made ahead and kernels may read until it is freed.

    `gpu` is the index of the one that was current when it was pinned: CUDA names it as the device of the memory.
    """

    gpu: int | None = None

    def pin(self) -> int:
        status = super().pin()
        if not status:
            self.gpu = torch.cuda.current_device()
        return status

    def _touch(self) -> None:
        self.bytes.zero_()  # with all cores

    def _unpin(self) -> None:
        if self._address is not None:
            for device in range(torch.cuda.device_count()):
                # on any GPU; one without memory runs nothing that reads it
                if device == torch.cuda.current_device() or torch.cuda.memory_reserved(device):
                    torch.cuda.synchronize(device)
        super()._unpin()


class FileMap(mmap.mmap):
    """A mapped file that can also be read by its descriptor; `is_private` says that edits stay in memory."""

    path: str
    is_private: bool
    _file: IO[bytes]

    @classmethod
    def open(cls, file: IO[bytes], nbytes: int, *, path: str, is_private: bool) -> "FileMap":
        """Map the first `nbytes` of `file`, which stays open as long as the map is there."""
        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE if is_private else mmap.MAP_SHARED
        mapping = cls(
            file.fileno(), nbytes, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE, **_NO_SECOND_DESCRIPTOR
        )
        mapping.path, mapping.is_private, mapping._file = path, is_private, file
        return mapping

    def read(self, offset: int, into: Tensor) -> None:  # type: ignore[override]
        """Read the bytes from `offset` on into a contiguous CPU tensor; raises CheckpointError where the file ends."""
        buffer = memory_of(into)
        try:
            got = read_into(buffer, self._file.fileno(), offset)
        except OSError as error:
            raise CheckpointError(f"cannot read offloaded tensors from {self.path}: {error}") from error
        if got < len(buffer):
            raise CheckpointError(
                f"{self.path} ended at byte {offset + got}, in the middle of tensors that are offloaded to it: "
                "it was cut short after the model was loaded; restore the file and load again"
            )

    def refuse_cut_short(self) -> None:
        """Raise a CheckpointError if the file is shorter than the map, where reading its tensors ends the process."""
        found = os.fstat(self._file.fileno()).st_size
        if found < len(self):
            raise CheckpointError(
                f"{self.path} had {len(self)} bytes and now has {found}: it was cut short after the model was loaded, "
                "and holds tensors of it; restore the file and load again"
            )

    def __del__(self) -> None:
        if hasattr(self, "_file"):  # an interrupt may have come before
            self._file.close()


class OffloadSpace:
    """Memory for one tensor of each of `specs`, by name, in `mapping`; make it with `pinned` or `in_file`.

    Tensors lie in the order of their names, so that those of one module are neighbours and travel in one copy.
    """

    def __init__(self, mapping: mmap.mmap, specs: Mapping[str, TensorSpec]) -> None:
        self._mapping, self._specs = mapping, specs
        self._offsets: dict[str, int] = {}
        end = 0
        for name in sorted(specs, key=lambda name: name.split(".")):
            self._offsets[name], end = end, end + align(specs[name].nbytes)
        _remember(mapping)

    @classmethod
    def pinned(cls, specs: Mapping[str, TensorSpec]) -> "OffloadSpace":
        """In pinned host memory; raises PlacementError where there is too little of it."""
        try:
            mapping = PinnedMap.of(_size(specs))
        except OSError as error:
            raise PlacementError(f"no memory for the modules on 'cpu': {error}; send fewer there") from error
        if status := mapping.pin():
            raise PlacementError(
                f"cannot pin {len(mapping) / 1e9:.3f} GB of host memory for modules on 'cpu' (CUDA error {status}): "
                "free some memory, raise the limit on locked memory, or send fewer modules to 'cpu'"
            )
        return cls(mapping, specs)

    @classmethod
    def in_file(cls, folder: str | os.PathLike[str], specs: Mapping[str, TensorSpec]) -> "OffloadSpace":
        """In an unnamed file in `folder`; raises PlacementError where it cannot be written or the disk is full."""
        size, file = _size(specs), None
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            file = _unnamed_file(Path(folder))
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            mapping = FileMap.open(file, size, path=f"the unnamed file in {os.fspath(folder)}", is_private=False)
        except OSError as error:
            if file is not None:
                file.close()
            raise PlacementError(
                f"offload_folder {os.fspath(folder)!r}: cannot reserve {size / 1e9:.3f} GB: {error}; "
                "free some space, pass another folder, or send fewer modules to 'disk'"
            ) from error
        return cls(mapping, specs)

    def empty(self, name: str) -> Tensor:
        """An uninitialized CPU tensor, the one called `name`; it owns its storage and keeps the space alive."""
        return _tensor(self._mapping, self._offsets[name], self._specs[name])


@dataclass(frozen=True)
class CheckpointMap:
    """A file of a checkpoint whose tensors may stay in it."""

    _mapping: FileMap

    @classmethod
    def open(cls, path: Path, nbytes: int, identity: FileIdentity | None = None) -> "CheckpointMap":
        """Map the file at `path`; raises CheckpointError unless it has `nbytes` bytes and is that of `identity`."""
        file = open_unchanged(path, nbytes, identity)
        try:
            mapping = FileMap.open(file, nbytes, path=str(path), is_private=True)
        except OSError as error:
            file.close()
            raise CheckpointError(f"cannot map {path}: {error}") from error
        _remember(mapping)
        return cls(mapping)

    def tensor(self, offset: int, spec: TensorSpec) -> Tensor:
        """The tensor of `spec` at byte `offset` of the file; an edit of it stays in memory."""
        return _tensor(self._mapping, offset, spec)


def mapping_of(tensor: Tensor) -> tuple[mmap.mmap, int] | None:
    """The mapping that a contiguous CPU tensor lies in and its offset there; None if it lies elsewhere."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not tensor.numel():
        return None
    address = tensor.data_ptr()
    for reference, addresses in list(_MAPS.values()):  # one step for other threads, which may add to it
        if address in addresses and (mapping := reference()) is not None:
            return mapping, address - addresses.start
    return None


def is_file_backed(tensor: Tensor) -> bool:
    """Whether `tensor` lies in a file: that of an OffloadSpace, or a checkpoint's."""
    place = mapping_of(tensor)
    return place is not None and isinstance(place[0], FileMap)


def read_stored(tensor: Tensor) -> Tensor:
    """The numbers of an offloaded tensor, read from its file if it lies in one; otherwise the tensor, detached.

    By descriptor and not through the map: a file that was cut short meanwhile is an error, and no SIGBUS. What was
    edited in memory is in the map alone, so that is read there, if the file is as long as it was.

    Raises:
        CheckpointError: the file ends before the tensor does.
    """
    own, place = tensor.detach(), mapping_of(tensor)
    if place is None or not isinstance(place[0], FileMap):
        return own
    if not own.is_contiguous() or is_edited(tensor, place[0]):
        place[0].refuse_cut_short()
        return own
    numbers = torch.empty_like(own)
    place[0].read(place[1], numbers)
    return numbers


def refuse_cut_short(tensors: Iterable[Tensor]) -> None:
    """Raise a CheckpointError if a file that holds some of `tensors` is shorter than it was when it was mapped."""
    places = (place for tensor in tensors if (place := mapping_of(tensor)) is not None)
    for mapping in {id(mapping): mapping for mapping, _ in places}.values():
        if isinstance(mapping, FileMap):
            mapping.refuse_cut_short()


def is_edited(tensor: Tensor, mapping: mmap.mmap) -> bool:
    """Whether edits of `tensor`, which lies in `mapping`, are in memory only, or may be where edits are not seen."""
    return isinstance(mapping, FileMap) and mapping.is_private and version_of(tensor) > 0


def _unnamed_file(folder: Path) -> FileIO:
    """A new file in `folder`, without a name from here on.

    `tempfile` has its descriptor as a number before an object closes it: an interrupt in between would lose it.
    """
    path = os.fspath(folder / f".bigq-{secrets.token_hex(16)}")
    try:
        return FileIO(path, "x+")
    finally:
        try:  # noqa: SIM105 - `suppress` and Path.unlink are Python code: an interrupt as it is entered leaves the file
            os.unlink(path)
        except FileNotFoundError:
            pass


def _size(specs: Mapping[str, TensorSpec]) -> int:
    return max(ALIGNMENT, sum(align(spec.nbytes) for spec in specs.values()))


def _remember(mapping: mmap.mmap) -> None:
    start = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
    _MAPS[start] = ref(mapping, partial(_forget, start)), range(start, start + len(mapping))


def _forget(start: int, reference: "ref[mmap.mmap]") -> None:
    if start in _MAPS and _MAPS[start][0] is reference:  # a new mapping may have taken the addresses
        del _MAPS[start]


def _tensor(mapping: mmap.mmap, offset: int, spec: TensorSpec) -> Tensor:
    if not spec.nbytes:
        return torch.empty(spec.shape, dtype=spec.dtype)
    raw = torch.frombuffer(mapping, dtype=torch.uint8, count=spec.nbytes, offset=offset)
    return raw.view(spec.dtype).view(spec.shape)
