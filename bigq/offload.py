"""OffloadFile: disk space for the tensors of offloaded modules, which are mapped where they lie.

The file has no name: no other model or process can read it half-written, and the system frees it with the last tensor,
however the process ends. Its space is reserved before the first tensor arrives, so a full disk is an error before any
work, and no tensor passes through anonymous memory on its way.
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

__all__ = ["OffloadFile", "is_file_backed"]

_ALIGNMENT = 64  # bytes; a cache line, and more than any dtype needs
_ADDRESSES: WeakKeyDictionary[mmap.mmap, range] = WeakKeyDictionary()


class OffloadFile:
    """An unnamed file in `folder`, with room for one tensor of each of `specs`.

    Raises:
        PlacementError: the folder cannot be made or written, or the disk has not enough room.
    """

    def __init__(self, folder: str | os.PathLike[str], specs: Iterable[TensorSpec]) -> None:
        self.nbytes = sum(_aligned(spec.nbytes) for spec in specs)
        self._next = 0
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder, prefix="bigq-") as file:
                size = max(self.nbytes, _ALIGNMENT)
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                self._map = mmap.mmap(file.fileno(), size)  # keeps the file after it is closed
        except OSError as error:
            raise PlacementError(
                f"offload_folder {os.fspath(folder)!r}: cannot reserve {self.nbytes / 1e9:.3f} GB: {error}; "
                "free some space, pass another folder, or send fewer modules to 'disk'"
            ) from error
        start = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()
        _ADDRESSES[self._map] = range(start, start + size)

    def empty(self, spec: TensorSpec) -> Tensor:
        """An uninitialized CPU tensor of `spec` in the file; it owns its storage and keeps the file alive."""
        if not spec.nbytes:
            return torch.empty(spec.shape, dtype=spec.dtype)
        offset, self._next = self._next, self._next + _aligned(spec.nbytes)
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=spec.nbytes, offset=offset)
        return raw.view(spec.dtype).view(spec.shape)


def is_file_backed(tensor: Tensor) -> bool:
    """Whether `tensor` lies in an OffloadFile."""
    if tensor.device.type != "cpu" or not tensor.numel():
        return False
    return any(tensor.data_ptr() in addresses for addresses in _ADDRESSES.values())


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
