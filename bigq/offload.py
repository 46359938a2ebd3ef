"""OffloadSpace: the memory that offloaded tensors rest in, pinned or in a file, reserved before the first one arrives.

A file has no name: no other model or process can read it half-written, and the system frees it with the last tensor,
however the process ends. Its space is reserved, so a full disk is an error before any work. Pinned memory is one
mapping of the exact size, registered with CUDA: torch's own pinned allocator rounds up to powers of two.
"""

import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from bigq.errors import PlacementError
from bigq.formats import TensorSpec

__all__ = ["OffloadSpace", "is_file_backed"]

_ALIGNMENT = 64  # bytes; a cache line, and more than any dtype needs
_FILES: WeakKeyDictionary[mmap.mmap, range] = WeakKeyDictionary()  # the addresses of each mapped file


class _PinnedMap(mmap.mmap):
    """Anonymous memory registered with CUDA, so that copies from it are asynchronous and run at the link's rate."""

    def pin(self) -> None:
        self._cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        self._address = torch.frombuffer(self, dtype=torch.uint8).data_ptr()
        status = int(self._cudart.cudaHostRegister(self._address, len(self), 0))
        if status:
            raise PlacementError(
                f"cannot pin {len(self) / 1e9:.3f} GB of host memory for modules on 'cpu' (CUDA error {status}): "
                "free some memory, raise the limit on locked memory, or send fewer modules to 'cpu'"
            )

    def __del__(self) -> None:  # before the memory is unmapped
        self._cudart.cudaHostUnregister(self._address)


class OffloadSpace:
    """Room for one tensor of each of `specs`, in `mapping`; make it with `pinned` or `in_file`."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        self._next = 0

    @classmethod
    def pinned(cls, specs: Iterable[TensorSpec]) -> "OffloadSpace":
        """Room in pinned host memory; raises PlacementError where there is too little of it."""
        try:
            mapping = _PinnedMap(-1, _size(specs), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise PlacementError(f"no memory for the modules on 'cpu': {error}; send fewer there") from error
        mapping.pin()
        return cls(mapping)

    @classmethod
    def in_file(cls, folder: str | os.PathLike[str], specs: Iterable[TensorSpec]) -> "OffloadSpace":
        """Room in an unnamed file in `folder`; raises PlacementError where it cannot be written or the disk is full."""
        size = _size(specs)
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder, prefix="bigq-") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                mapping = mmap.mmap(file.fileno(), size)  # keeps the file after it is closed
        except OSError as error:
            raise PlacementError(
                f"offload_folder {os.fspath(folder)!r}: cannot reserve {size / 1e9:.3f} GB: {error}; "
                "free some space, pass another folder, or send fewer modules to 'disk'"
            ) from error
        start = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
        _FILES[mapping] = range(start, start + size)
        return cls(mapping)

    def empty(self, spec: TensorSpec) -> Tensor:
        """An uninitialized CPU tensor of `spec` in this space; it owns its storage and keeps the space alive."""
        if not spec.nbytes:
            return torch.empty(spec.shape, dtype=spec.dtype)
        offset, self._next = self._next, self._next + _aligned(spec.nbytes)
        raw = torch.frombuffer(self._mapping, dtype=torch.uint8, count=spec.nbytes, offset=offset)
        return raw.view(spec.dtype).view(spec.shape)


def is_file_backed(tensor: Tensor) -> bool:
    """Whether `tensor` lies in the file of an OffloadSpace."""
    if tensor.device.type != "cpu" or not tensor.numel():
        return False
    return any(tensor.data_ptr() in addresses for addresses in _FILES.values())


def _size(specs: Iterable[TensorSpec]) -> int:
    return max(_ALIGNMENT, sum(_aligned(spec.nbytes) for spec in specs))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
