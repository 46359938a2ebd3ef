"""A safetensors file, read by the safetensors library; and a header alone, of a file that is not on this machine."""

import math
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bigq.checkpoint.byte_source import ByteSource
from bigq.checkpoint.source import StoredTensor
from bigq.checkpoint.spans import Span
from bigq.errors import CheckpointError
from bigq.system.json_text import parse_json
from bigq.system.text import shortlist

__all__ = ["DTYPE_NAMES", "MAX_HEADER_NBYTES", "SafetensorsFile", "describe_header"]

# The dtypes of the format that torch has; the format also has F6_E2M3 and F6_E3M2.
_LARGEST_INT64 = 2**63 - 1
_DTYPES = {
    "BOOL": torch.bool,
    "F4": torch.float4_e2m1fn_x2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
MAX_HEADER_NBYTES = 100_000_000  # the library's own limit


class SafetensorsFile:
    """An open, memory-mapped file whose header the library has validated. Use it as a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._handle: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: no memory to map it
            raise CheckpointError(f"cannot open {path}: {_explain(path) or str(error)[:500]}") from error

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._handle.__exit__(kind, error, traceback)

    def describe(self, source: ByteSource) -> list[StoredTensor]:
        """Describe the tensors, in the order of their bytes in the file, which `source` reads."""
        names = self._handle.offset_keys()
        headers = {name: self._handle.get_slice(name) for name in names}
        dtypes = {name: header.get_dtype() for name, header in headers.items()}
        unknown = [(name, dtype) for name, dtype in dtypes.items() if dtype not in _DTYPES]
        if unknown:
            raise CheckpointError(f"cannot open {self._path}: {_name_dtypes(unknown)}")
        infos, offset = [], self._data_offset(len(names))
        for name, header in headers.items():
            infos.append(_stored(name, _DTYPES[dtypes[name]], header.get_shape(), source, offset))
            offset += infos[-1].nbytes  # the library refuses files with holes
        return infos

    def read(self, name: str) -> Tensor:
        """Return one tensor, a view of the memory map."""
        try:
            tensor: Tensor = self._handle.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"cannot read tensor {name!r} of {self._path}: {error}") from error
        return tensor

    def _data_offset(self, count: int) -> int:
        """Where the bytes of the tensors begin; refuses a header that names one of the `count` tensors twice."""
        with self._path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length)
        # The library takes one of two entries. An escape may write their keys in other ways, so it is a doubt, too.
        if header.count(b'"data_offsets"') != count or b"\\" in header:
            _, twice = parse_json(header)
            if twice:
                raise CheckpointError(f"cannot open {self._path}: its header names {shortlist(twice)} twice")
        return 8 + length


def describe_header(header: bytes, source: ByteSource, start: int) -> list[StoredTensor]:
    """Describe the tensors of a `header`, in the order of their bytes, which `source` has from `start` on.

    Raises:
        ValueError: it is damaged, or does not describe exactly the bytes that there are.
        CheckpointError: a tensor is none that torch can hold.
    """
    said, twice = parse_json(header)
    if not isinstance(said, dict) or twice:
        raise ValueError(f"its header names {shortlist(twice)} twice" if twice else "its header is no JSON object")
    entries = []
    for name, entry in said.items():
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(first), int(last)]}:
                if not all(type(size) is int and size >= 0 for size in shape):
                    raise ValueError(f"its header gives {name!r} no shape")
                entries.append((first, last, name, dtype, shape))
            case _ if name != "__metadata__":
                raise ValueError(f"its header does not describe {name!r}")
    unknown = [(name, dtype) for _, _, name, dtype, _ in entries if dtype not in _DTYPES]
    if unknown:
        raise ValueError(_name_dtypes(unknown))
    found, end = [], 0
    for first, last, name, dtype, shape in sorted(entries, key=lambda entry: entry[:2]):
        if first != end:
            raise ValueError(f"tensor {name!r} begins at byte {first} of the data, expected {end}")
        found.append(_stored(name, _DTYPES[dtype], shape, source, start + first))
        end = last
        if found[-1].nbytes != last - first:
            raise ValueError(f"tensor {name!r} takes {found[-1].nbytes} bytes, but its header gives it {last - first}")
    if start + end != source.nbytes:
        raise ValueError(_wrong_size(start + end, source.nbytes))
    return found


def _stored(name: str, dtype: torch.dtype, shape: list[int], source: ByteSource, offset: int) -> StoredTensor:
    if dtype is torch.float4_e2m1fn_x2:  # the format counts values, torch counts bytes of two
        if not shape or shape[-1] % 2:
            raise CheckpointError(
                f"{source.name}: tensor {name!r} packs two 4-bit values to a byte, "
                f"so its last dimension must be even, but its shape is {shape}"
            )
        shape = [*shape[:-1], shape[-1] // 2]
    if max(shape, default=0) > _LARGEST_INT64:  # only an empty tensor gets this far
        raise CheckpointError(f"{source.name}: tensor {name!r} has a shape beyond 64 bits: {shape}")
    span = Span(source, offset, math.prod(shape) * dtype.itemsize)
    return StoredTensor(name=name, shape=torch.Size(shape), dtype=dtype, where=source.name, spans=(span,))


def _name_dtypes(tensors: list[tuple[str, str]]) -> str:
    named = shortlist([f"{name!r} ({dtype})" for name, dtype in tensors])
    return f"it holds tensors of dtypes that torch does not have: {named}; expected {', '.join(_DTYPES)}"


def _explain(path: Path) -> str | None:
    """Say in terms of sizes and tensors why the library refused a file, if that can be said."""
    if path.is_dir():
        return "it is a folder, expected a file"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or 8 + length > size:
                return f"it has {size} bytes, too few for its header: it is truncated or no safetensors file"
            if length > MAX_HEADER_NBYTES:
                return None
            header, _ = parse_json(file.read(length))
    except (OSError, ValueError):
        return None
    if not isinstance(header, dict):
        return None
    unknown, end = [], 0
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "data_offsets": [int(), int(stop)]}:
                end = max(end, stop)
                if dtype not in _DTYPES:
                    unknown.append((name, dtype))
    if unknown:
        return _name_dtypes(unknown)
    if 8 + length + end != size:
        return _wrong_size(8 + length + end, size)
    return None


def _wrong_size(described: int, size: int) -> str:
    return (
        f"its header describes {described} bytes, but it has {size}: "
        "it was cut short or changed; download or copy it again"
    )
