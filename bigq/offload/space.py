"""OffloadSpace: the memory of offloaded tensors, pinned or in a file, reserved before the first one arrives.

An unnamed file: no other model or process can read it half-written, and the system frees it with the last tensor,
however the process ends. Its space is reserved, so a full disk is an error before any work. Pinned memory is one
mapping of the exact size, registered with CUDA: torch's own pinned allocator rounds up to powers of two. What a
checkpoint already holds as needed stays there: its tensors are copy-on-write maps, so no edit reaches the file.
"""

import mmap
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from bigq.errors import CheckpointError, PlacementError
from bigq.formats import TensorSpec
from bigq.system.files import open_unchanged, read_into
from bigq.system.memory import ALIGNMENT, align, memory_of

__all__ = ["CheckpointMap", "FileMap", "OffloadSpace", "is_file_backed", "mapping_of"]

_MAP_NORESERVE = 0x4000  # Linux: a private map may be larger than RAM and swap; nothing writes to most of it
_MAPS: WeakKeyDictionary[mmap.mmap, range] = WeakKeyDictionary()  # the addresses of each mapping


class _PinnedMap(mmap.mmap):
    """Anonymous memory registered with CUDA, so that copies from it are asynchronous and run at the link's rate."""

    _address: int | None = None

    def pin(self) -> None:
        self._cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        memory = torch.frombuffer(self, dtype=torch.uint8)
        memory.zero_()  # with all cores: the driver would touch the pages one by one
        status = int(self._cudart.cudaHostRegister(memory.data_ptr(), len(self), 0))
        if not status:
            self._address = memory.data_ptr()
        else:
            raise PlacementError(
                f"cannot pin {len(self) / 1e9:.3f} GB of host memory for modules on 'cpu' (CUDA error {status}): "
                "free some memory, raise the limit on locked memory, or send fewer modules to 'cpu'"
            )

    def __del__(self) -> None:  # before the memory is unmapped
        if self._address is not None:
            torch.cuda.synchronize()  # a copy made ahead may still read it
            self._cudart.cudaHostUnregister(self._address)


class FileMap(mmap.mmap):
    """A mapped file that can also be read by its descriptor; `is_private` says that edits stay in memory."""

    path: str
    is_private: bool
    _descriptor: int

    @classmethod
    def open(cls, descriptor: int, nbytes: int, *, path: str, is_private: bool) -> "FileMap":
        """Map the first `nbytes` of a file; keeps a duplicate of `descriptor`."""
        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE if is_private else mmap.MAP_SHARED
        mapping = cls(descriptor, nbytes, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        mapping.path, mapping.is_private, mapping._descriptor = path, is_private, os.dup(descriptor)
        return mapping

    def read(self, offset: int, into: Tensor) -> None:  # type: ignore[override]
        """Read the bytes from `offset` on into a contiguous CPU tensor; raises CheckpointError where the file ends."""
        buffer = memory_of(into)
        try:
            got = read_into(buffer, self._descriptor, offset)
        except OSError as error:
            raise CheckpointError(f"cannot read offloaded tensors from {self.path}: {error}") from error
        if got < len(buffer):
            raise CheckpointError(
                f"{self.path} ended at byte {offset + got}, in the middle of tensors that are offloaded to it: "
                "it was cut short after the model was loaded; restore the file and load again"
            )

    def __del__(self) -> None:
        os.close(self._descriptor)


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
            mapping = _PinnedMap(-1, _size(specs), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise PlacementError(f"no memory for the modules on 'cpu': {error}; send fewer there") from error
        mapping.pin()
        return cls(mapping, specs)

    @classmethod
    def in_file(cls, folder: str | os.PathLike[str], specs: Mapping[str, TensorSpec]) -> "OffloadSpace":
        """In an unnamed file in `folder`; raises PlacementError where it cannot be written or the disk is full."""
        size = _size(specs)
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder, prefix="bigq-") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                path = f"the unnamed file in {os.fspath(folder)}"
                mapping = FileMap.open(file.fileno(), size, path=path, is_private=False)
        except OSError as error:
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
    def open(cls, path: Path, nbytes: int) -> "CheckpointMap":
        """Map the file at `path`; raises CheckpointError unless it has `nbytes` bytes."""
        descriptor = open_unchanged(path, nbytes)
        try:
            mapping = FileMap.open(descriptor, nbytes, path=str(path), is_private=True)
        except OSError as error:
            raise CheckpointError(f"cannot map {path}: {error}") from error
        finally:
            os.close(descriptor)
        _remember(mapping)
        return cls(mapping)

    def tensor(self, offset: int, spec: TensorSpec) -> Tensor:
        """The tensor of `spec` at byte `offset` of the file; an edit of it stays in memory."""
        return _tensor(self._mapping, offset, spec)


def mapping_of(tensor: Tensor) -> tuple[mmap.mmap, int] | None:
    """The mapping that a contiguous CPU tensor lies in and its offset there; None if it lies elsewhere."""
    if tensor.device.type != "cpu" or not tensor.numel():
        return None
    address = tensor.data_ptr()
    return next(((mapping, address - at.start) for mapping, at in list(_MAPS.items()) if address in at), None)


def is_file_backed(tensor: Tensor) -> bool:
    """Whether `tensor` lies in a file: that of an OffloadSpace, or a checkpoint's."""
    place = mapping_of(tensor)
    return place is not None and isinstance(place[0], FileMap)


def _size(specs: Mapping[str, TensorSpec]) -> int:
    return max(ALIGNMENT, sum(align(spec.nbytes) for spec in specs.values()))


def _remember(mapping: mmap.mmap) -> None:
    start = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
    _MAPS[mapping] = range(start, start + len(mapping))


def _tensor(mapping: mmap.mmap, offset: int, spec: TensorSpec) -> Tensor:
    if not spec.nbytes:
        return torch.empty(spec.shape, dtype=spec.dtype)
    raw = torch.frombuffer(mapping, dtype=torch.uint8, count=spec.nbytes, offset=offset)
    return raw.view(spec.dtype).view(spec.shape)
