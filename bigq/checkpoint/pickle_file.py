"""A state dict that torch.save pickled, read without running any code it may carry."""

import os
import re
import sys
from pathlib import Path
from types import TracebackType
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import Tensor, nn

from bigq.checkpoint.shortlist import shortlist
from bigq.checkpoint.source import ByteSource, Span, StoredTensor
from bigq.errors import CheckpointError

__all__ = ["PickleFile"]

_ZIP_MAGIC = b"PK\x03\x04"


class PickleFile:
    """A loaded state dict: memory-mapped, or, if torch.save wrote the format from before 1.6, in memory.

    Use it as a context manager; leaving it drops the tensors.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors = _load(path)

    def __enter__(self) -> "PickleFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tensors = {}

    def describe(self, source: ByteSource) -> list[StoredTensor]:
        """Describe the tensors, in the order of their bytes in the file, which `source` reads."""
        maps = _maps(self._path)
        return [
            StoredTensor(
                name=name,
                shape=tensor.shape,
                dtype=tensor.dtype,
                where=source.name,
                spans=() if (offset := _file_offset(tensor, maps)) is None else (Span(source, offset, tensor.nbytes),),
            )
            for name, tensor in self._tensors.items()
        ]

    def read(self, name: str) -> Tensor:
        """Return one tensor, a view of the memory map if there is one."""
        return self._tensors[name]


def _load(path: Path) -> dict[str, Tensor]:
    if torch.__version__ < "2.10":
        raise CheckpointError(
            f"{path} is a pickle, which torch {torch.__version__} does not load safely (CVE-2026-24747): "
            "upgrade torch to 2.10 or later, or convert the file to safetensors"
        )
    try:
        with path.open("rb") as file:
            mapped = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
        if mapped:
            _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (CheckpointError, Warning):  # a warning of torch's that the user made an error
        raise
    except OSError as error:
        raise CheckpointError(f"cannot open {path}: {error}") from error
    except Exception as error:  # a damaged pickle fails in whatever way its opcodes happen to
        raise CheckpointError(_explain(path, error)) from error
    tensors = _flat(path, content)
    # Tensors of a map lie in memory as they do in the file; the dict's order is the writer's.
    return dict(sorted(tensors.items(), key=lambda item: item[1].data_ptr())) if mapped else tensors


def _check_archive(path: Path) -> None:
    """Refuse an archive whose bytes are not those of the tensors, which a memory map would not notice."""
    with ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != ZIP_STORED:
                raise CheckpointError(f"{path} is compressed ({entry.filename}): load and save it again with torch")
            if entry.filename.endswith("/byteorder") and archive.read(entry).decode() != sys.byteorder:
                raise CheckpointError(f"{path} was saved on a machine of another byte order: save it as safetensors")


def _maps(path: Path) -> list[tuple[range, int]]:
    """(addresses, offset in the file) of each memory map of a file; empty where the system has no list of them."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    maps = []
    for line in lines:
        addresses, _, offset, _, _, *name = line.split(maxsplit=5)
        if name == [os.path.realpath(path)]:
            start, stop = (int(address, 16) for address in addresses.split("-"))
            maps.append((range(start, stop), int(offset, 16)))
    return maps


def _file_offset(tensor: Tensor, maps: list[tuple[range, int]]) -> int | None:
    """Where the bytes of a mapped tensor lie in the file; None for one in memory or with gaps."""
    if tensor.is_contiguous():
        for addresses, offset in maps:
            if tensor.data_ptr() in addresses:
                return tensor.data_ptr() - addresses.start + offset
    return None


def _explain(path: Path, error: Exception) -> str:
    if match := re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error)):
        return (
            f"{path} holds Python objects ({match[1]}) beside tensors, and loading those can run code: refused; "
            "if you trust the file, load it with torch.load(..., weights_only=False) "
            "and save its tensors as safetensors"
        )
    reason = (str(error).strip() or "the file ends early").splitlines()[0]
    return (
        f"cannot load {path} as a state dict ({type(error).__name__}: {reason}): "
        "it is damaged, truncated or not written by torch.save; download or save it again"
    )


def _flat(path: Path, content: object) -> dict[str, Tensor]:
    """Require a flat dict of plain tensors, or say where in the file one may be."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dict of names and tensors")
    nested = [key for key, value in content.items() if isinstance(value, dict) and _any_tensor(value)]
    if nested:
        raise CheckpointError(
            f"{path} is not a flat state dict, its tensors are under {shortlist([repr(key) for key in nested])}: "
            "extract one with "
            f"torch.save(torch.load({str(path)!r}, weights_only=True)[{nested[0]!r}], 'state_dict.pt')"
        )
    problems = [problem for key, value in content.items() if (problem := _refusal(key, value))]
    if problems:
        raise CheckpointError(f"{path} is not a dict of names and dense tensors: {shortlist(problems)}")
    return {name: tensor.detach() for name, tensor in content.items()}


def _any_tensor(values: dict[object, object]) -> bool:
    return any(isinstance(value, Tensor) for value in values.values())


def _refusal(key: object, value: object) -> str | None:
    if not isinstance(key, str):
        return f"the key {key!r} is a {type(key).__name__}, not a name"
    if type(value) not in (Tensor, nn.Parameter):
        return f"{key!r} is a {type(value).__name__}, not a tensor"
    assert isinstance(value, Tensor)
    if value.is_quantized:
        return f"{key!r} is quantized by torch ({value.dtype}), dequantize it first"
    if value.layout != torch.strided or value.is_nested:
        return f"{key!r} is sparse or nested ({value.layout}), call to_dense() first"
    if value.device.type != "cpu":
        return f"{key!r} was saved without data, from the {value.device.type} device"
    return None
