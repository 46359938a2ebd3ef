"""A state dict that torch.save pickled, read without running any code it may carry."""

import re
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from bigq.checkpoint.archive import ZIP_MAGIC, MappedFile, read_records
from bigq.checkpoint.source import ByteSource, Span, StoredTensor
from bigq.errors import CheckpointError
from bigq.system.text import shortlist

__all__ = ["PickleFile"]


class PickleFile:
    """A loaded state dict: memory-mapped, or, if torch.save wrote the format from before 1.6, in memory.

    It is in memory, too, where the system does not say what is mapped. Use it as a context manager; leaving it drops
    the tensors.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors, self._offsets = _open(path)

    def __enter__(self) -> "PickleFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tensors = {}

    def describe(self, source: ByteSource) -> list[StoredTensor]:
        """Describe the tensors, in the order of their bytes in the file, which `source` reads."""
        return [
            StoredTensor(
                name=name,
                shape=tensor.shape,
                dtype=tensor.dtype,
                where=source.name,
                spans=(Span(source, self._offsets[name], tensor.nbytes),) if name in self._offsets else (),
            )
            for name, tensor in self._tensors.items()
        ]

    def read(self, name: str) -> Tensor:
        """Return one tensor, a view of the memory map if there is one."""
        return self._tensors[name].resolve_conj().resolve_neg()


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors of a pickle, and where in the file those of them begin that lie in it as they are."""
    if torch.__version__ < "2.10":
        raise CheckpointError(
            f"{path} is a pickle, which torch {torch.__version__} does not load safely (CVE-2026-24747): "
            "upgrade torch to 2.10 or later, or convert the file to safetensors"
        )
    try:
        with path.open("rb") as file:
            is_archive = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        records = read_records(path) if is_archive else {}
        tensors = _flat(path, _load(path, mmap=is_archive))
        if is_archive:
            offsets = _storage_offsets(path, tensors)
            if offsets is not None:
                return _in_order(path, tensors, offsets, records)
            tensors = _flat(path, _load(path, mmap=False))
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot open {path}: {error}") from error
    except Exception as error:  # a damaged pickle fails in whatever way its opcodes happen to
        raise CheckpointError(_explain(path, error)) from error
    return tensors, {}


def _load(path: Path, *, mmap: bool) -> object:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _storage_offsets(path: Path, tensors: dict[str, Tensor]) -> dict[str, int] | None:
    """Where in the file the storage of each tensor that is not empty begins; None if that is not known of all."""
    file = MappedFile(path)
    addresses = {name: tensor.untyped_storage().data_ptr() for name, tensor in tensors.items() if tensor.nbytes}
    offsets = {name: file.offset_of(address) for name, address in addresses.items()}
    found = {name: offset for name, offset in offsets.items() if offset is not None}
    return found if len(found) == len(offsets) else None


def _in_order(
    path: Path, tensors: dict[str, Tensor], storage_offsets: dict[str, int], records: dict[int, int]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors in the order of their bytes in the file, and the offsets of those that lie in it as they are.

    Raises:
        CheckpointError: a storage is no whole record, which torch looks at only where it does not map a file.
    """
    wrong: list[str] = []
    offsets: dict[str, int] = {}
    for name, start in storage_offsets.items():
        nbytes = tensors[name].untyped_storage().nbytes()
        if records.get(start) != nbytes:
            wrong.append(f"{name!r} takes {nbytes} bytes, and its record has {records.get(start, 0)}")
        offsets[name] = start + int(tensors[name].storage_offset()) * tensors[name].itemsize
    if wrong:
        raise CheckpointError(
            f"{path} is damaged: {len(wrong)} of its tensors do not fit their records: {shortlist(wrong)}; "
            "download or save it again"
        )
    ordered = dict(sorted(tensors.items(), key=lambda item: offsets.get(item[0], 0)))
    return ordered, {name: offset for name, offset in offsets.items() if _is_plain(tensors[name])}


def _is_plain(tensor: Tensor) -> bool:
    """Whether the numbers of `tensor` are its bytes one after the other: no gaps, and no bit that negates them."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


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
        return f"a key is a {type(key).__name__}, not a name"  # a tuple of 200 bytes may have a repr of 42 MB
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
