"""ShardFile: a safetensors file that is written tensor by tensor, and rows of a tensor as they come.

safetensors' own function wants all tensors in memory. Here every tensor has its place in the file before the first one
is there, because its shape and dtype are known. What is longer or shorter than it was expected to be, such as JSON with
a number in it, comes last, and the header is written in the end, into the space that was left for it.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType

from torch import Tensor

from bigq.checkpoint.safetensors_file import DTYPE_NAMES
from bigq.formats import TensorSpec
from bigq.system.files import write_all
from bigq.system.memory import memory_of

__all__ = ["ShardFile", "data_nbytes"]

_ALIGNMENT = 8  # bytes: where the tensors begin, as the largest dtype of safetensors needs it
_SLACK = 64  # bytes by which a tensor that is not exactly known may be longer than it was expected to be


class ShardFile:
    """A safetensors file at `path` that is being written. Use it as a context manager, and call `finish` in it.

    Args:
        path: an earlier file is replaced.
        specs: every tensor, by name.
        late: names of tensors of uint8 whose length is known only when they are written.
        metadata: of the header.

    Raises:
        OSError: it cannot be written, such as on a full disk; with the path in it.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], *, late: Collection[str], metadata: Mapping[str, str]
    ) -> None:
        self._path, self._metadata = path, {"format": "pt", **metadata}
        exact = [name for name in specs if name not in late]
        # no holes are allowed, and each tensor has to be aligned: those of large elements come first
        self._specs = {name: specs[name] for name in sorted(exact, key=lambda name: -specs[name].dtype.itemsize)}
        self._offsets: dict[str, int] = {}
        self._data_nbytes = 0
        for name, spec in self._specs.items():
            self._offsets[name] = self._data_nbytes
            self._data_nbytes += spec.nbytes
        self._unwritten = {name: spec.nbytes for name, spec in self._specs.items() if spec.nbytes}
        self._awaited = {name: specs[name].nbytes + _SLACK for name in late}
        self._late: dict[str, Tensor] = {}
        longest = {name: TensorSpec(shape=(nbytes,), dtype=specs[name].dtype) for name, nbytes in self._awaited.items()}
        self._start = 8 + _aligned(len(self._header({**self._specs, **longest})))
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> "ShardFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, name: str, tensor: Tensor, *, start: int = 0) -> None:
        """Write a tensor, or its rows from row `start` on; `tensor` may be on any device."""
        held = tensor.detach().cpu().contiguous()
        if name in self._awaited:
            self._late[name] = held.clone()
            return
        spec = self._specs[name]
        row_nbytes = spec.nbytes // spec.shape[0] if spec.shape and spec.shape[0] else 0
        if held.dtype != spec.dtype or (held.nbytes != spec.nbytes and held.nbytes != len(held) * row_nbytes):
            raise AssertionError(f"{name}: expected {spec}, got {held.dtype} {list(held.shape)}")
        if held.nbytes:
            self._write(memory_of(held), self._start + self._offsets[name] + start * row_nbytes)
            self._unwritten[name] -= held.nbytes

    def finish(self) -> int:
        """Write the header, once every tensor is written; returns the bytes of all tensors."""
        missing = [name for name, nbytes in self._unwritten.items() if nbytes]
        missing += [name for name in self._awaited if name not in self._late]
        if missing:
            raise AssertionError(f"{self._path}: not or twice written: {missing[:10]}")
        end = self._data_nbytes
        for tensor in (self._late[name] for name in self._awaited):
            if tensor.nbytes:
                self._write(memory_of(tensor), self._start + end)
            end += tensor.nbytes
        late = {
            name: TensorSpec(shape=tuple(self._late[name].shape), dtype=self._late[name].dtype)
            for name in self._awaited
        }
        header = self._header({**self._specs, **late})
        nbytes = self._start - 8
        if len(header) > nbytes:
            raise AssertionError(f"{self._path}: a tensor is more than {_SLACK} bytes longer than it was expected")
        self._write(memoryview(nbytes.to_bytes(8, "little") + header.ljust(nbytes)), 0)
        return end

    def _header(self, specs: Mapping[str, TensorSpec]) -> bytes:
        content: dict[str, object] = {"__metadata__": self._metadata}
        end = 0
        for name, spec in specs.items():
            start, end = end, end + spec.nbytes
            content[name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, end],
            }
        return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()

    def _write(self, data: memoryview, offset: int) -> None:
        write_all(self._path, self._file.fileno(), data, offset)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def data_nbytes(path: Path) -> int:
    """The bytes of all tensors of the safetensors file at `path`."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
