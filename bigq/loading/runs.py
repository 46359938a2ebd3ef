"""Runs: neighbouring tensors of a source for one device are one piece of memory, read and handed on as one.

So what is done for a run is not done for each of 19,000 small tensors.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, groupby, zip_longest
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from bigq.checkpoint import ByteSource, Scales, Span, StoredTensor, cut_out, joined
from bigq.system.internals import cut
from bigq.system.interrupts import Latch

__all__ = ["Chunk", "Piece", "Run", "Target", "make_runs", "take_turns"]

_MAX_HOLDERS = 16  # files with the scales of a run, all of which are open while it is read
_ALIGNMENT = 16  # bytes; Triton compiles another kernel for pointers that are not aligned to it


@dataclass(frozen=True, kw_only=True)
class Target:
    """How a tensor is to arrive on `device`.

    Args:
        allocate: returns the memory that the tensor stays in; None for a temporary view, valid until the next step.
        may_split: one beyond the budget may arrive in pieces of whole rows.
        row_group: each piece but the last has a multiple of so many rows.
    """

    device: torch.device
    allocate: Callable[[], Tensor] | None = None
    may_split: bool = True
    row_group: int = 1


class Piece(NamedTuple):
    """Rows of a tensor, from row `start` on; most pieces are whole tensors. A temporary one has to be copied."""

    info: StoredTensor
    start: int
    tensor: Tensor
    is_temporary: bool = True


class Part(NamedTuple):
    """Rows of a tensor in a run: `nbytes` of them, from row `start` on; of one with a coding, the rows of its codes."""

    info: StoredTensor
    start: int
    shape: tuple[int, ...]
    nbytes: int

    @property
    def made_nbytes(self) -> int:
        """Bytes of the numbers that it becomes."""
        return self.nbytes if self.info.coding is None else self.nbytes * self.info.coding.expansion


class Chunk(NamedTuple):
    """Bytes of a run that are read by one thread, into `memory`: those of `spans`, from `start` of the run on.

    The scales of its codes follow the last of its own bytes, in memory of their own.
    """

    run: "Run"
    start: int
    spans: tuple[Span, ...]
    memory: Tensor


class Run:
    """Bytes that are read into one piece of memory: of one span, which `append` makes longer, or of several.

    The scales of codes are read beside them, into a second piece, and reach a GPU on the same way. A copy of their own
    from pageable memory would wait for all copies before it: about 10 ms for each of the 120 runs of an 8B model.
    """

    def __init__(self, target: Target, spans: tuple[Span, ...]) -> None:
        self.target, self.nbytes, self._spans = target, 0, spans
        self.made_nbytes = self.decoded_nbytes = 0  # bytes of the numbers that it becomes; those made of codes
        self.scales_nbytes = 0
        self.parts: list[Part] = []
        self._scales: list[tuple[Scales, ...]] = []  # of each part
        self.holders: dict[int, ByteSource] = {}  # of the scales of its parts, by identity
        self.handed_over = Latch()  # every chunk is read, and its copy to a GPU queued
        self._lock = Lock()

    def append(self, part: Part) -> None:
        self.parts.append(part)
        self.nbytes += part.nbytes
        self.made_nbytes += part.made_nbytes
        scales: tuple[Scales, ...] = ()
        coding = part.info.coding
        if coding is not None and part.nbytes:
            self.decoded_nbytes += part.made_nbytes
            scales = coding.plain_scales(part.start, part.shape[0])
            self.scales_nbytes += sum(own.nbytes for own in scales)
            own_holders = {id(span.source): span.source for own in scales for span in own.spans}
            self.holders |= own_holders or coding.holders  # `decode` reads scales that are not plain bytes
        self._scales.append(scales)

    @property
    def sources(self) -> dict[int, ByteSource]:
        """What it and its scales are read from; by identity."""
        return {id(span.source): span.source for span in self._spans} | self.holders

    @property
    def spans(self) -> tuple[Span, ...]:
        """Where its bytes lie, one after the other."""
        if len(self._spans) > 1:
            return self._spans
        return (self._spans[0]._replace(nbytes=self.nbytes),)

    def is_continued_by(self, part: Part, spans: tuple[Span, ...], target: Target, limit: int) -> bool:
        """Whether `part`, which lies in `spans`, can be appended: its bytes follow, and one piece of memory suits."""
        (source, offset, _), (next_source, next_offset, _) = self._spans[0], spans[0]
        return (
            offset + self.nbytes == next_offset
            and self.nbytes % _ALIGNMENT == 0
            and self.made_nbytes + part.made_nbytes <= limit
            and target.allocate is None
            and self.target.allocate is None
            and self.target.device == target.device
            and source is next_source
            and len(self._spans) == len(spans) == 1
            and len(self.holders) < _MAX_HOLDERS
        )

    @property
    def temporary_nbytes(self) -> int:
        """Bytes of temporary memory: a power of two, which the allocator can use again for the next run.

        The scales of codes are there too. What codes become is not: only the run that is handed on has made it.
        """
        return 0 if self.target.allocate is not None else self._buffer_nbytes + self.scales_nbytes

    @property
    def _buffer_nbytes(self) -> int:
        return 1 << max(0, self.nbytes - 1).bit_length()

    def name_at(self, at: int) -> str:
        """The name of the tensor that byte `at` of the run belongs to; that of a scale behind its own bytes."""
        ends = [(part.info.name, part.nbytes) for part in self.parts]
        if at >= self.nbytes:
            ends += [(scale.name, scale.nbytes) for own in self._scales for scale in own]
        end = 0
        for name, nbytes in ends:
            end += nbytes
            if at < end:
                return name
        return ends[-1][0]

    def start(self, chunk_nbytes: int) -> list[Chunk]:
        """Make the memory; returns what is to be read.

        A chunk goes over the ends of spans: its copy and its turns at Python's lock are then one for many experts of a
        stack, of which each has a span of its own.
        """
        if self.target.allocate is not None:
            self._memory = self.target.allocate()
            self._bytes = self._memory.reshape(-1).view(torch.uint8)
        else:
            self._memory = torch.empty(self._buffer_nbytes, dtype=torch.uint8, device=self.target.device)
            self._bytes = self._memory[: self.nbytes]
        if not self.nbytes:
            self.handed_over.open()
            return []
        chunks = self._chunks(0, self.spans, self._bytes, chunk_nbytes)
        if self.scales_nbytes:
            self._scale_bytes = torch.empty(self.scales_nbytes, dtype=torch.uint8, device=self.target.device)
            spans = joined(span for own in self._scales for scale in own for span in scale.own_spans)
            chunks += self._chunks(self.nbytes, spans, self._scale_bytes, chunk_nbytes)
        self._unread = len(chunks)
        return chunks

    def _chunks(self, before: int, spans: tuple[Span, ...], memory: Tensor, chunk_nbytes: int) -> list[Chunk]:
        """Those of the bytes of `spans`, which follow `before` bytes of the run, into `memory`."""
        starts = range(0, len(memory), chunk_nbytes)
        parts = memory.split(chunk_nbytes)  # type: ignore[no-untyped-call]
        return [
            Chunk(self, before + start, cut_out(spans, start, len(part)), part)
            for start, part in zip(starts, parts, strict=True)
        ]

    def chunk_done(self) -> None:
        """Count a chunk that is read, its copy queued, or given up; for any thread."""
        with self._lock:
            self._unread -= 1
            if not self._unread:
                self.handed_over.open()

    def pieces(self) -> list[Piece]:
        """The tensors, once all chunks have arrived."""
        if self.target.allocate is not None:
            return [Piece(self.parts[0].info, 0, self._memory, is_temporary=False)]
        pieces, at, before = [], 0, 0  # bytes, and those of scales
        scales = iter(self._scales)
        for dtype, parts in groupby(self.parts, key=_dtype_read):
            alike = list(parts)
            nbytes = sum(part.nbytes for part in alike)
            tensors = cut(self._bytes[at : at + nbytes].view(dtype), [part.shape for part in alike])
            for part, tensor in zip(alike, tensors, strict=True):
                own = sum(scale.nbytes for scale in next(scales))
                pieces.append(_piece(part, tensor, self._scale_bytes[before : before + own] if own else None))
                before += own
            at += nbytes
        return pieces


def _dtype_read(part: Part) -> torch.dtype:
    return part.info.dtype if part.info.coding is None else torch.uint8


def _piece(part: Part, tensor: Tensor, scales: Tensor | None) -> Piece:
    """The piece that was read as `tensor`, which holds numbers, or codes with `scales`."""
    coding = part.info.coding
    return Piece(part.info, part.start, tensor if coding is None else coding.decode(tensor, part.start, scales))


def make_runs(tensors: Iterable[StoredTensor], targets: Mapping[str, Target], limit: int) -> Iterator[Run]:
    """Cut tensors that have spans, in stored order, into runs.

    A run becomes at most `limit` bytes of numbers, or holds one tensor that does not split, has memory of its own or
    has several spans.
    """
    run: Run | None = None
    for stored in tensors:
        target = targets[stored.name]
        for part, spans in _parts(stored, target, limit):
            if run is None or not run.is_continued_by(part, spans, target, limit):
                if run is not None:
                    yield run
                run = Run(target, spans)
            run.append(part)
    if run is not None:
        yield run


def _parts(stored: StoredTensor, target: Target, limit: int) -> list[tuple[Part, tuple[Span, ...]]]:
    """The tensor, or pieces of whole rows of one that is too large, each with the spans that its bytes lie in."""
    shape, nbytes = tuple(stored.shape), stored.nbytes
    if stored.coding is not None:  # of codes, the rows of bytes; the limit is that of the numbers
        shape, limit = (shape[0], nbytes // max(1, shape[0])), limit // stored.coding.expansion
    if target.allocate is not None or not target.may_split or nbytes <= limit or not shape:
        return [(Part(stored, 0, shape, nbytes), stored.spans)]
    row_nbytes = nbytes // shape[0]
    step = max(1, limit // (row_nbytes * target.row_group)) * target.row_group
    counts = {start: min(step, shape[0] - start) for start in range(0, shape[0], step)}
    return [
        (
            Part(stored, start, (count, *shape[1:]), count * row_nbytes),
            cut_out(stored.spans, start * row_nbytes, count * row_nbytes),
        )
        for start, count in counts.items()
    ]


def take_turns(runs: Iterable[Run]) -> Iterator[Run]:
    """The runs of each device in order, a run of each device in turn, so that the links of all work at once."""
    queues: dict[torch.device, list[Run]] = {}
    for run in runs:
        queues.setdefault(run.target.device, []).append(run)
    return (run for run in chain.from_iterable(zip_longest(*queues.values())) if run is not None)
