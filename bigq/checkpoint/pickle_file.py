"""A state dict that torch.save pickled, read without running any code it may carry."""

import re
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from bigq.checkpoint.archive import ZIP_MAGIC, MappedFile, read_records
from bigq.checkpoint.byte_source import ByteSource
from bigq.checkpoint.source import StoredTensor
from bigq.checkpoint.spans import Span
from bigq.checkpoint.state_dict import StateDict, find_state_dict
from bigq.errors import CheckpointError
from bigq.system.internals import sparse_parts
from bigq.system.text import shortlist

__all__ = ["PickleFile"]


class PickleFile:
    """A loaded state dict: memory-mapped, or, if torch.save wrote the format from before 1.6, in memory.

    It is in memory, too, where the system does not say what is mapped. `others` says what the state dict holds beside
    tensors and `extra_states`. Use it as a context manager; leaving it drops the tensors.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        found, self._offsets = _open(path)
        self._keys, self._tensors = found.keys, found.tensors
        self.extra_states, self.others = found.extra_states, found.others

    def __enter__(self) -> "PickleFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tensors = {}

    def describe(self, source: ByteSource) -> list[StoredTensor]:
        """Describe the tensors, in the order of their bytes in the file, which `source` reads."""
        where = source.name + "".join(f"[{key!r}]" for key in self._keys)
        return [
            StoredTensor(
                name=name,
                shape=tensor.shape,
                dtype=tensor.dtype,
                where=where,
                spans=(Span(source, self._offsets[name], tensor.nbytes),) if name in self._offsets else (),
            )
            for name, tensor in self._tensors.items()
        ]

    def read(self, name: str) -> Tensor:
        """Return one tensor, a view of the memory map if there is one; a sparse one is made dense."""
        tensor = self._tensors[name]
        try:
            dense = tensor if tensor.layout == torch.strided else _dense(tensor)
        except RuntimeError as error:
            raise CheckpointError(f"cannot read tensor {name!r} of {self._path}: {error}") from error
        return dense.resolve_conj().resolve_neg()


def _open(path: Path) -> tuple[StateDict, dict[str, int]]:
    """The state dict of a pickle, and where in the file those of its tensors begin that lie in it as they are."""
    if torch.__version__ < "2.10":
        raise CheckpointError(
            f"{path} is a pickle, which torch {torch.__version__} does not load safely (CVE-2026-24747): "
            "upgrade torch to 2.10 or later, or convert the file to safetensors"
        )
    try:
        with path.open("rb") as file:
            is_archive = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        records = read_records(path) if is_archive else {}
        found = find_state_dict(path, _load(path, mmap=is_archive))
        if is_archive:
            mapped = _mapped(path, found, records)
            if mapped is not None:
                return mapped
            found = find_state_dict(path, _load(path, mmap=False))
    except (CheckpointError, Warning):  # a warning of torch's that the user made an error
        raise
    except OSError as error:
        raise CheckpointError(f"cannot open {path}: {error}") from error
    except Exception as error:  # a damaged pickle fails in whatever way its opcodes happen to
        raise CheckpointError(_explain(path, error)) from None  # a traceback would show what torch advises
    return found, {}


def _load(path: Path, *, mmap: bool) -> object:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _mapped(path: Path, found: StateDict, records: dict[int, int]) -> tuple[StateDict, dict[str, int]] | None:
    """`found` in the order of the bytes in the file, and the offsets of the tensors that lie in it as they are.

    None where it is not known of all of them where in the file they lie.

    Raises:
        CheckpointError: a storage is no whole record, which torch looks at only where it does not map a file.
    """
    file = MappedFile(path)
    wrong: list[str] = []
    offsets: dict[str, int] = {}
    for name, tensor in found.tensors.items():
        for part in _strided(tensor):
            nbytes = part.untyped_storage().nbytes()
            if not part.nbytes:
                continue
            start = file.offset_of(part.untyped_storage().data_ptr())
            if start is None:
                return None
            if records.get(start) != nbytes:
                wrong.append(f"{name!r} takes {nbytes} bytes, and its record has {records.get(start, 0)}")
            offsets[name] = start + int(part.storage_offset()) * part.itemsize
    if wrong:
        raise CheckpointError(
            f"{path} is damaged: {len(wrong)} of its tensors do not fit their records: {shortlist(wrong)}; "
            "download or save it again"
        )
    tensors = dict(sorted(found.tensors.items(), key=lambda item: offsets.get(item[0], 0)))
    plain = {name: offset for name, offset in offsets.items() if _is_plain(tensors[name])}
    return replace(found, tensors=tensors), plain


def _strided(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors with a storage that `tensor` consists of."""
    if tensor.layout == torch.sparse_coo:
        return sparse_parts(tensor)
    if tensor.layout == torch.sparse_csr:
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return (tensor,)


def _dense(tensor: Tensor) -> Tensor:
    """A sparse tensor of a file as a dense one; raises RuntimeError where its indices are none of its shape."""
    if tensor.layout == torch.sparse_coo:
        indices, values = _strided(tensor)
        return torch.sparse_coo_tensor(indices, values, tensor.shape, check_invariants=True).to_dense()
    rows, columns, values = _strided(tensor)
    return torch.sparse_csr_tensor(rows, columns, values, tensor.shape, check_invariants=True).to_dense()


def _is_plain(tensor: Tensor) -> bool:
    """Whether the numbers of `tensor` are its bytes one after the other: no gaps, and no bit that negates them."""
    return tensor.layout == torch.strided and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _explain(path: Path, error: Exception) -> str:
    """Why a pickle was not read; without what torch advises, which is to run the code in it."""
    text = str(error)
    if match := re.search(r"(?:Unsupported (?:global: GLOBAL|class)|unsupported GLOBAL) (\S+)", text):
        return (
            f"{path} holds Python objects ({match[1]:.200}) beside tensors, and loading those can run code: refused; "
            "ask whoever made it for its state_dict() alone, best as safetensors"
        )
    _, _, reason = text.rpartition("WeightsUnpickler error: ")
    reason = (reason.strip() or "the file ends early").splitlines()[0]
    if "weights_only" in reason:
        reason = "torch refuses it"
    return (
        f"cannot load {path} as a state dict ({type(error).__name__}: {reason:.300}): "
        "it is damaged, truncated or not written by torch.save; download or save it again"
    )
