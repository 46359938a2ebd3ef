"""Source: where a load takes tensors from, and where the bytes of each of them lie."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from bigq.checkpoint.byte_source import ByteSource
from bigq.checkpoint.scaled_rows import ScaledRows
from bigq.checkpoint.spans import Span
from bigq.errors import CheckpointError
from bigq.system.memory import memory_of
from bigq.system.text import shortlist

__all__ = [
    "ReadError",
    "Source",
    "StoredTensor",
    "read_small",
    "read_tensor",
    "refuse_unknown",
]


class ReadError(CheckpointError):
    """Bytes that a ByteSource did not give.

    Args:
        name: the name of the ByteSource.
        at: the byte of it from which on nothing came.
        reason: why it could not be read; None where it ended there, though it had more bytes when it was opened.
    """

    def __init__(self, name: str, at: int, reason: str | None = None) -> None:
        super().__init__(name, at, reason)
        self.name, self.at, self.reason = name, at, reason

    def __str__(self) -> str:
        if self.reason is not None:
            return f"cannot read {self.name} from byte {self.at} on: {self.reason}"
        return f"{self.name} ended at byte {self.at}: it was cut short while it was read"

    def in_tensor(self, tensor: str) -> CheckpointError:
        """The same error, for a reader who knows which tensor the byte belongs to."""
        if self.reason is not None:
            return CheckpointError(f"cannot read tensor {tensor!r} of {self.name}: {self.reason}")
        return CheckpointError(
            f"{self.name} ended at byte {self.at}, in the middle of tensor {tensor!r}: "
            "it was cut short while it was read"
        )


_set = object.__setattr__  # of a frozen dataclass
_LONGEST_NAME = 4096  # characters


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """What a source says of one of its tensors before it is read.

    `where` is what errors call the place that holds it, such as the path of a file. The bytes of `spans`, one after the
    other, are the tensor, row-major and little-endian; there is none where it lies in no plain bytes, as in a legacy
    pickle or in a model in memory. With `coding` they are codes, of which it makes the tensor. `nbytes` counts the
    bytes of the spans. Raises CheckpointError unless they are as many as the tensor or its codes have, and for a name
    that no model has, because errors repeat it.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    where: str
    spans: tuple[Span, ...] = field(default=(), compare=False, repr=False)
    coding: ScaledRows | None = field(default=None, compare=False, repr=False)
    nbytes: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        coding, spans = self.coding, self.spans
        nbytes = self.shape.numel() * self.dtype.itemsize if coding is None else coding.nbytes
        _set(self, "nbytes", nbytes)  # read several times for each of 19,000 tensors
        if len(self.name) > _LONGEST_NAME:
            raise CheckpointError(
                f"a tensor of {self.where} has a name of {len(self.name)} characters, which begins with "
                f"{self.name[:80]!r}; expected at most {_LONGEST_NAME}"
            )
        if not spans:
            return
        found = spans[0].nbytes if len(spans) == 1 else sum(span.nbytes for span in spans)
        if found != nbytes:
            raise CheckpointError(
                f"tensor {self.name!r} of {self.where}: {self.dtype} {list(self.shape)} takes {nbytes} bytes, "
                f"but its spans hold {found}: whatever describes it so is wrong"
            )


class Source(Protocol):
    """Named tensors: a checkpoint, a model in memory, or another source under other names."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor by its name, in the order in which they are stored."""

    @property
    def in_place(self) -> bool:
        """Whether the tensors are those of the model that is being filled.

        Each is then replaced as soon as it is done, and there is no second copy to go back to.
        """

    def check(self) -> None:
        """Raise a CheckpointError if there are tensors that hold no numbers, such as those on meta."""

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) in stored order, whatever the order of `names`.

        The tensors may be views of a file or of the model: copy what must outlive the next step, and do not write to
        them. Raises CheckpointError at once where `names` holds what is not in `tensors`.
        """


def read_tensor(stored: StoredTensor) -> Tensor:
    """Read a tensor that has spans into CPU memory of its own; closes nothing.

    Raises:
        CheckpointError: a span cannot be read.
    """
    if not stored.spans:
        raise CheckpointError(f"tensor {stored.name!r} of {stored.where} lies in no plain bytes: use Source.read")
    coding, cpu = stored.coding, torch.device("cpu")  # explicit: a caller may be inside `with torch.device("meta")`
    if coding is None:
        tensor = torch.empty(stored.shape, dtype=stored.dtype, device=cpu)
    else:
        tensor = torch.empty(stored.nbytes, dtype=torch.uint8, device=cpu)
    if tensor.nbytes:
        memory, start = memory_of(tensor), 0
        for span in stored.spans:
            try:
                span.source.read_into(memory[start : start + span.nbytes], span.offset)
            except ReadError as error:
                raise error.in_tensor(stored.name) from error
            start += span.nbytes
    return tensor if coding is None else coding.decode(tensor)


def read_small(source: Source, wanted: Sequence[StoredTensor]) -> dict[str, bytes]:
    """The bytes of small tensors of `source` by name; each file is opened once, and closed in the end.

    In a tenth of the time that `Source.read` takes, which maps files and makes tensors. They are read in the order of
    their offsets, because neighbours in a file on the Hub are one request.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    found: dict[str, bytes] = {}
    opened: dict[int, ByteSource] = {}
    try:
        in_bytes = [stored for stored in wanted if len(stored.spans) == 1]
        for stored in sorted(in_bytes, key=lambda stored: (stored.where, stored.spans[0].offset)):
            ((holder, offset, nbytes),) = stored.spans
            opened[id(holder)] = holder
            data = bytearray(nbytes)
            try:
                holder.read_into(memoryview(data), offset)
            except ReadError as error:
                raise error.in_tensor(stored.name) from error
            found[stored.name] = bytes(data)
    finally:
        for holder in opened.values():
            holder.close()
    rest = [stored.name for stored in wanted if stored.name not in found]
    return found | {name: bytes(memory_of(tensor.contiguous())) for name, tensor in source.read(rest)}


def refuse_unknown(names: Collection[str], tensors: Mapping[str, StoredTensor], holder: str) -> None:
    """Raise a CheckpointError that lists those of `names` that are not in `tensors`, which `holder` holds."""
    unknown = sorted(name for name in names if name not in tensors)
    if unknown:
        raise CheckpointError(f"{holder} does not hold {shortlist([repr(name) for name in unknown])}")
