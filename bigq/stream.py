"""stream: read tensors with several threads, each straight to the device that works on it.

A file is read in file order, in runs: neighbouring tensors for one device are one piece of memory, so that what is done
for a run is not done for each of 19,000 small tensors. What goes to a GPU passes through a ring of pinned memory, each
byte once, while the chunks before it are copied; what stays on the CPU is read into place. Nothing is mapped, so a file
that is cut short meanwhile is an error and no SIGBUS.
"""

import ctypes
import operator
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain, zip_longest
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import NamedTuple

import torch
from torch import Tensor

from bigq.checkpoint import Checkpoint, TensorInfo
from bigq.errors import CheckpointError, ConfigError
from bigq.machine import usable_cores, usable_memory_nbytes
from bigq.stages import Stages

__all__ = ["Budget", "Piece", "Target", "stream"]

_CHUNK_NBYTES = (
    16 << 20
)  # 22 GB/s with 8 threads; 21, 14 and 9 in chunks of 8, 4 and 2 MiB, for which Python is too slow
_SLOTS = 2  # pinned chunks a thread: one is filled while the other is copied
_ALIGNMENT = 16  # bytes; Triton compiles another kernel for pointers that are not aligned to it


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a load may use of the machine: `threads` that read, and `nbytes` of memory for tensors on their way."""

    threads: int
    nbytes: int

    @classmethod
    def of_machine(cls, threads: int | None, nbytes: int | None) -> "Budget":
        """`threads` and `nbytes`, or what suits the machine where they are None.

        Eight threads saturate a PCIe 5 link from the page cache; 512 MiB keep them and the GPU busy.
        """
        for name, value, least in (("read_threads", threads, 1), ("read_budget", nbytes, 1 << 20)):
            if value is not None and (not isinstance(value, int) or value < least):
                raise ConfigError(f"{name} is {value!r}; expected None or an integer of at least {least}")
        return cls(
            threads=min(8, usable_cores()) if threads is None else threads,
            nbytes=max(1 << 20, min(512 << 20, usable_memory_nbytes() // 8)) if nbytes is None else nbytes,
        )

    @property
    def run_nbytes(self) -> int:
        """Bytes of a run, a power of two: at least four are on their way at once."""
        return 1 << (self.nbytes // 4).bit_length() - 1

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of a chunk: the pinned ring takes at most half of `nbytes`."""
        return min(_CHUNK_NBYTES, max(4096, self.nbytes // (2 * _SLOTS * self.threads)))


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


def stream(
    checkpoint: Checkpoint,
    targets: Mapping[str, Target],
    budget: Budget,
    stages: Stages,
    room: Callable[[torch.device], int] = lambda device: 0,
) -> Iterator[list[Piece]]:
    """Yield the tensors named in `targets` in file order, neighbours together; devices take turns.

    On a GPU the pieces are ready for work on the current stream. What lies in no plain bytes of a file, such as a
    legacy pickle, comes last, as views on the CPU.

    Args:
        budget: threads, and bytes of lent memory at once.
        stages: gets "read" (seconds of all threads in reads), "copy" (of all threads waiting for copies to a GPU) and
            "wait" (of the consumer, for both).
        room: bytes beyond the budget that may be lent on a GPU now.

    Raises:
        CheckpointError: a file cannot be read, or is not what it was when the checkpoint was opened.
    """
    infos = [info for name, info in checkpoint.tensors.items() if name in targets]
    runs = _runs((info for info in infos if info.offset is not None), targets, budget.run_nbytes)
    yield from _Reader(checkpoint, _take_turns(runs), budget, stages, room).pieces()
    for name, tensor in checkpoint.read([info.name for info in infos if info.offset is None]):
        yield [Piece(checkpoint.tensors[name], 0, tensor)]


@dataclass(kw_only=True)
class _Part:
    """Rows of a tensor: from row `start` on, `nbytes` of them."""

    info: TensorInfo
    start: int
    shape: tuple[int, ...]
    nbytes: int


class _Run:
    """Bytes of a file that are read into one piece of memory; `chunks` counts what is not handed to the device yet."""

    def __init__(self, target: Target, offset: int) -> None:
        self.target, self.offset, self.nbytes = target, offset, 0
        self.parts: list[_Part] = []
        self.lock, self.handed_over = Lock(), Event()
        self.copied: dict[torch.cuda.Stream, torch.cuda.Event] = {}  # the last copy of each thread
        self.free: torch.cuda.Event | None = None

    def append(self, part: _Part) -> None:
        self.parts.append(part)
        self.nbytes += part.nbytes

    @property
    def file(self) -> Path:
        return self.parts[0].info.file

    @property
    def lent_nbytes(self) -> int:
        """Bytes of lent memory; powers of two, which the allocator can use again for the next run."""
        return 0 if self.target.own is not None else 1 << max(0, self.nbytes - 1).bit_length()

    def start(self, chunk_nbytes: int) -> range:
        """Make the memory; returns where the chunks start."""
        device = self.target.device
        if self.target.own is not None:
            self.memory = self.target.own()
            self.bytes = self.memory.reshape(-1).view(torch.uint8)
        else:
            self.bytes = self.memory = torch.empty(self.lent_nbytes, dtype=torch.uint8, device=device)
        if device.type == "cuda":  # the allocator may have given memory that work queued earlier still uses
            self.free = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.free.record(torch.cuda.current_stream(device))
        starts = range(0, self.nbytes, chunk_nbytes)
        self.chunks = len(starts)
        if not self.chunks:
            self.handed_over.set()
        return starts

    def chunk_done(self) -> None:
        with self.lock:
            self.chunks -= 1
            if not self.chunks:
                self.handed_over.set()

    def pieces(self) -> list[Piece]:
        """The tensors, ready on the current stream."""
        for copied in self.copied.values():
            torch.cuda.current_stream(self.target.device).wait_event(copied)
        if self.target.own is not None:
            return [Piece(self.parts[0].info, 0, self.memory, is_lent=False)]
        pieces, at = [], 0
        typed: dict[torch.dtype, Tensor] = {}
        for part in self.parts:
            dtype = part.info.dtype
            if dtype not in typed:
                typed[dtype] = self.bytes[: self.nbytes // dtype.itemsize * dtype.itemsize].view(dtype)
            # One call of torch's a tensor: each lets go of Python's lock, for which the readers wait.
            tensor = typed[dtype].as_strided(part.shape, _strides(part.shape), at // dtype.itemsize)
            pieces.append(Piece(part.info, part.start, tensor))
            at += part.nbytes
        return pieces


@cache
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple(accumulate(reversed(shape[1:]), operator.mul, initial=1))[::-1] if shape else ()


def _runs(infos: Iterable[TensorInfo], targets: Mapping[str, Target], limit: int) -> Iterator[_Run]:
    """Cut the tensors into runs of at most `limit` bytes, or of one tensor that has memory of its own."""
    run: _Run | None = None
    for info in infos:
        target = targets[info.name]
        for part, offset in _parts(info, target, limit):
            if run is not None and target.own is None and _continues(run, part, offset, target, limit):
                run.append(part)
                continue
            if run is not None:
                yield run
            run = _Run(target, offset)
            run.append(part)
    if run is not None:
        yield run


def _continues(run: _Run, part: _Part, offset: int, target: Target, limit: int) -> bool:
    return (
        run.target.own is None
        and run.target.device == target.device
        and run.file == part.info.file
        and run.offset + run.nbytes == offset
        and run.nbytes % _ALIGNMENT == 0
        and run.nbytes + part.nbytes <= limit
    )


def _parts(info: TensorInfo, target: Target, limit: int) -> Iterator[tuple[_Part, int]]:
    """The tensor, or pieces of whole rows of one that is too large, each with its offset in the file."""
    assert info.offset is not None
    shape = tuple(info.shape)
    if target.own is not None or not target.splits or info.nbytes <= limit or not shape:
        yield _Part(info=info, start=0, shape=shape, nbytes=info.nbytes), info.offset
        return
    row_nbytes = info.nbytes // shape[0]
    rows = max(1, limit // row_nbytes)
    for start in range(0, shape[0], rows):
        count = min(rows, shape[0] - start)
        part = _Part(info=info, start=start, shape=(count, *shape[1:]), nbytes=count * row_nbytes)
        yield part, info.offset + start * row_nbytes


def _take_turns(runs: Iterable[_Run]) -> Iterator[_Run]:
    """The runs of each device in order, a run of each device in turn, so that the links of all work at once."""
    queues: dict[torch.device, list[_Run]] = {}
    for run in runs:
        queues.setdefault(run.target.device, []).append(run)
    return (run for run in chain.from_iterable(zip_longest(*queues.values())) if run is not None)


class _Reader:
    """Threads that read chunks, and a consumer that starts runs within the budget and takes them in order."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        runs: Iterable[_Run],
        budget: Budget,
        stages: Stages,
        room: Callable[[torch.device], int],
    ) -> None:
        self.checkpoint, self.runs, self.budget, self.room, self.stages = checkpoint, deque(runs), budget, room, stages
        self.files: dict[Path, int] = {}
        self.work: SimpleQueue[tuple[_Run, int] | None] = SimpleQueue()
        self.error: BaseException | None = None
        self.threads = [Thread(target=self._run, daemon=True) for _ in range(budget.threads)]

    def pieces(self) -> Iterator[list[Piece]]:
        in_flight: deque[_Run] = deque()
        lent = 0
        try:
            for thread in self.threads if self.runs else ():
                thread.start()
            while self.runs or in_flight:
                while self.runs and (not in_flight or self._may_start(self.runs[0], lent)):
                    in_flight.append(self._start(self.runs.popleft()))
                    lent += in_flight[-1].lent_nbytes
                run = in_flight.popleft()
                with self.stages.timed("wait"):
                    run.handed_over.wait()
                if self.error is not None:
                    raise self.error
                pieces = run.pieces()
                lent -= run.lent_nbytes
                del run  # or it would keep the memory while the consumer makes what replaces it
                yield pieces
                del pieces
        finally:
            self.error = self.error or GeneratorExit()  # threads drop what is left
            for _ in self.threads:
                self.work.put(None)
            for thread in self.threads:
                if thread.ident is not None:  # an interrupt may have come before it was started
                    thread.join()
            for descriptor in self.files.values():
                os.close(descriptor)

    def _may_start(self, run: _Run, lent: int) -> bool:
        return lent + run.lent_nbytes <= self.budget.nbytes + self.room(run.target.device)

    def _start(self, run: _Run) -> _Run:
        if run.file not in self.files:
            self.files[run.file] = _open(run.file, self.checkpoint.file_nbytes[run.file])
        for start in run.start(self.budget.chunk_nbytes):
            self.work.put((run, start))
        return run

    def _run(self) -> None:
        slots = deque[tuple[Tensor, torch.cuda.Event | None]]()
        streams: dict[torch.device, torch.cuda.Stream] = {}
        while (job := self.work.get()) is not None:
            run, start = job
            try:
                if self.error is None:
                    self._move(run, start, slots, streams)
            except BaseException as error:  # handed to the consumer, which raises it
                self.error = self.error or error
            run.chunk_done()
            del job, run  # or an idle thread would keep the memory alive
        for _, copied in slots:
            if copied is not None:
                copied.synchronize()

    def _move(
        self,
        run: _Run,
        start: int,
        slots: deque[tuple[Tensor, torch.cuda.Event | None]],
        streams: dict[torch.device, torch.cuda.Stream],
    ) -> None:
        """Read one chunk and queue its copy to the GPU, if it goes to one."""
        nbytes = self.budget.chunk_nbytes
        target = run.bytes[start : min(start + nbytes, run.nbytes)]
        if run.free is None:
            self._read(run, start, target)
            return
        if len(slots) < _SLOTS:
            slots.appendleft((torch.empty(nbytes, dtype=torch.uint8, pin_memory=True), None))
        slot, last = slots.popleft()
        if last is not None:
            with self.stages.timed("copy", len(target)):
                last.synchronize()
        self._read(run, start, slot[: len(target)])
        device = run.target.device
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = streams[device]
        torch.cuda.set_stream(stream)  # of this thread only
        stream.wait_event(run.free)
        target.copy_(slot[: len(target)], non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(stream)
        run.copied[stream] = copied
        slots.append((slot, copied))

    def _read(self, run: _Run, start: int, into: Tensor) -> None:
        began = time.perf_counter()
        buffer = memoryview((ctypes.c_char * len(into)).from_address(into.data_ptr())).cast("B")
        offset, done = run.offset + start, 0
        while done < len(into):
            try:
                got = os.preadv(self.files[run.file], [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"cannot read tensor {_tensor_at(run, start)!r} of {run.file}: {error}"
                ) from error
            if not got:
                raise CheckpointError(
                    f"{run.file} ended at byte {offset + done}, in the middle of tensor "
                    f"{_tensor_at(run, start + done)!r}: it was cut short while it was read"
                )
            done += got
        self.stages.add("read", time.perf_counter() - began, done)


def _tensor_at(run: _Run, at: int) -> str:
    """The name of the tensor that byte `at` of a run belongs to."""
    end = 0
    for part in run.parts:
        end += part.nbytes
        if at < end:
            break
    return part.info.name


def _open(path: Path, expected_nbytes: int) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"cannot open {path}: {error}") from error
    found = os.fstat(descriptor).st_size
    if found != expected_nbytes:
        os.close(descriptor)
        raise CheckpointError(
            f"{path} changed after it was opened: it had {expected_nbytes} bytes and now has {found}; load again"
        )
    return descriptor
