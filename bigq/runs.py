"""Runs: neighbouring tensors of a file for one device are one piece of memory, read and handed on as one.

So what is done for a run is not done for each of 19,000 small tensors.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain, groupby, zip_longest
from pathlib import Path
from threading import Event, Lock
from typing import NamedTuple

import torch
from torch import Tensor

from bigq.checkpoint import TensorInfo

__all__ = ["Chunk", "Piece", "Run", "Target", "make_runs", "take_turns"]

_ALIGNMENT = 16  # bytes; Triton compiles another kernel for pointers that are not aligned to it


@dataclass(frozen=True, kw_only=True)
class Target:
    """How a tensor is to arrive on `device`: in memory of its own, which `own` makes, or as a view that is lent.

    A lent tensor is good until the next step. Where it `splits`, one beyond the budget comes in pieces of whole rows.
    """

    device: torch.device
    own: Callable[[], Tensor] | None = None
    splits: bool = True


class Piece(NamedTuple):
    """Rows of a tensor, from row `start` on; most pieces are whole tensors. One that `is_lent` is to be copied."""

    info: TensorInfo
    start: int
    tensor: Tensor
    is_lent: bool = True


class Part(NamedTuple):
    """Rows of a tensor in a run: `nbytes` of them, from row `start` on."""

    info: TensorInfo
    start: int
    shape: tuple[int, ...]
    nbytes: int


class Chunk(NamedTuple):
    """Bytes of a run that are read at once: those from `start` on, which belong into `memory`."""

    run: "Run"
    start: int
    memory: Tensor


class Run:
    """Bytes of a file that are read into one piece of memory, from `offset` of the file on."""

    def __init__(self, target: Target, offset: int) -> None:
        self.target, self.offset, self.nbytes = target, offset, 0
        self.parts: list[Part] = []
        self.handed_over = Event()  # every chunk is read, and its copy to a GPU queued
        self._lock = Lock()

    def append(self, part: Part) -> None:
        self.parts.append(part)
        self.nbytes += part.nbytes

    @property
    def file(self) -> Path:
        return self.parts[0].info.file

    @property
    def lent_nbytes(self) -> int:
        """Bytes of lent memory; powers of two, which the allocator can use again for the next run."""
        return 0 if self.target.own is not None else 1 << max(0, self.nbytes - 1).bit_length()

    def name_at(self, at: int) -> str:
        """The name of the tensor that byte `at` of the run belongs to."""
        end = 0
        for part in self.parts:
            end += part.nbytes
            if at < end:
                break
        return part.info.name

    def start(self, chunk_nbytes: int) -> list[Chunk]:
        """Make the memory; returns what is to be read."""
        if self.target.own is not None:
            self._memory = self.target.own()
            self._bytes = self._memory.reshape(-1).view(torch.uint8)
        else:
            self._memory = torch.empty(self.lent_nbytes, dtype=torch.uint8, device=self.target.device)
            self._bytes = self._memory[: self.nbytes]
        if not self.nbytes:
            self.handed_over.set()
            return []
        memory = self._bytes.split(chunk_nbytes)  # type: ignore[no-untyped-call]
        self._unread = len(memory)
        return [Chunk(self, chunk_nbytes * i, chunk) for i, chunk in enumerate(memory)]

    def chunk_done(self) -> None:
        """Count a chunk that is read, its copy queued, or given up; for any thread."""
        with self._lock:
            self._unread -= 1
            if not self._unread:
                self.handed_over.set()

    def pieces(self) -> list[Piece]:
        """The tensors, once all chunks have arrived."""
        if self.target.own is not None:
            return [Piece(self.parts[0].info, 0, self._memory, is_lent=False)]
        pieces, at = [], 0
        for dtype, parts in groupby(self.parts, key=lambda part: part.info.dtype):
            alike = list(parts)
            nbytes = sum(part.nbytes for part in alike)
            tensors = _cut(self._bytes[at : at + nbytes].view(dtype), [part.shape for part in alike])
            pieces += [Piece(part.info, part.start, tensor) for part, tensor in zip(alike, tensors, strict=True)]
            at += nbytes
        return pieces


def _cut(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Views of `flat` in these shapes, one after the other.

    In one call of torch's: each lets go of Python's lock, for which the reading threads wait.
    """
    views = torch._C._nn.unflatten_dense_tensors(flat, [_of_shape(shape) for shape in shapes])
    return [view if view.numel() else view.view(shape) for view, shape in zip(views, shapes, strict=True)]


@cache
def _of_shape(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, device="meta")


def make_runs(infos: Iterable[TensorInfo], targets: Mapping[str, Target], limit: int) -> Iterator[Run]:
    """Cut tensors, in file order, into runs of at most `limit` bytes, or of one tensor with memory of its own."""
    run: Run | None = None
    for info in infos:
        target = targets[info.name]
        for part, offset in _parts(info, target, limit):
            if run is None or not _continues(run, part, offset, target, limit):
                if run is not None:
                    yield run
                run = Run(target, offset)
            run.append(part)
    if run is not None:
        yield run


def _continues(run: Run, part: Part, offset: int, target: Target, limit: int) -> bool:
    return (
        run.offset + run.nbytes == offset
        and run.nbytes % _ALIGNMENT == 0
        and run.nbytes + part.nbytes <= limit
        and target.own is None
        and run.target.own is None
        and run.target.device == target.device
        and run.file == part.info.file
    )


def _parts(info: TensorInfo, target: Target, limit: int) -> list[tuple[Part, int]]:
    """The tensor, or pieces of whole rows of one that is too large, each with its offset in the file."""
    assert info.offset is not None
    shape, nbytes = tuple(info.shape), info.nbytes
    if target.own is not None or not target.splits or nbytes <= limit or not shape:
        return [(Part(info, 0, shape, nbytes), info.offset)]
    row_nbytes = nbytes // shape[0]
    step = max(1, limit // row_nbytes)
    counts = {start: min(step, shape[0] - start) for start in range(0, shape[0], step)}
    return [
        (Part(info, start, (count, *shape[1:]), count * row_nbytes), info.offset + start * row_nbytes)
        for start, count in counts.items()
    ]


def take_turns(runs: Iterable[Run]) -> Iterator[Run]:
    """The runs of each device in order, a run of each device in turn, so that the links of all work at once."""
    queues: dict[torch.device, list[Run]] = {}
    for run in runs:
        queues.setdefault(run.target.device, []).append(run)
    return (run for run in chain.from_iterable(zip_longest(*queues.values())) if run is not None)
