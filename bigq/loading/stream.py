"""stream: read tensors with several threads, each straight to the device that works on it.

A source is read in stored order, in runs. What goes to a GPU passes through a ring of pinned memory, each byte once,
while the chunks before it are copied; what stays on the CPU is read into place. Nothing is mapped, so a file that is
cut short meanwhile is an error and no SIGBUS.
"""

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock

import torch

from bigq.checkpoint import ByteSource, ReadError, Source
from bigq.errors import ConfigError
from bigq.loading.link import Link, StagingBuffer
from bigq.loading.runs import Chunk, Piece, Run, Target, make_runs, take_turns
from bigq.loading.timings import Timings
from bigq.system.files import open_unchanged
from bigq.system.interrupts import Worker, to_the_end
from bigq.system.machine import processes_of_job, usable_cores, usable_memory_nbytes
from bigq.system.memory import memory_of

__all__ = ["READ_BUDGET_NBYTES", "Budget", "stream"]

READ_BUDGET_NBYTES = 768 << 20  # see Budget.of_machine

# 22 GB/s with 8 threads; 21, 14 and 9 in chunks of 8, 4 and 2 MiB, for which Python is too slow
_CHUNK_NBYTES = 16 << 20
_BUFFERS = 2  # staging buffers a thread: one is filled while the other is copied
_MAX_OPEN = 64  # sources: tiny files all fit the budget at once, and a process may open 1024, or 256
_TURN_S = 5e-4  # for which a thread keeps Python's lock; Python's own is 5e-3


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a load may use of the machine: `threads` that read, and `nbytes` of memory for tensors on their way."""

    threads: int
    nbytes: int

    @classmethod
    def of_machine(cls, threads: int | None = None, nbytes: int | None = None) -> "Budget":
        """`threads` and `nbytes`, or what suits the machine where they are None.

        Twelve threads read 24 GB/s from the page cache (8: 17, 10: 21; one H100, whose link does 47 GB/s).
        768 MiB are 16 MiB twice for each of them, and as much again for the GPU. The processes that torchrun
        has started on this machine share its cores and its memory, so each takes its part of them.
        """
        for name, value, least in (("read_threads", threads, 1), ("read_budget", nbytes, 1 << 20)):
            if value is not None and (not isinstance(value, int) or value < least):
                raise ConfigError(f"{name} is {value!r}; expected None or an integer of at least {least}")
        processes = processes_of_job()
        if threads is None:
            threads = min(12, max(1, usable_cores() // processes))
        if nbytes is None:
            nbytes = max(1 << 20, min(READ_BUDGET_NBYTES, usable_memory_nbytes() // (8 * processes)))
        return cls(threads=threads, nbytes=nbytes)

    @property
    def run_nbytes(self) -> int:
        """Bytes of a run, a power of two: at least four are on their way at once."""
        return 1 << (self.nbytes // 4).bit_length() - 1

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of a chunk: the pinned ring takes at most half of `nbytes`."""
        return min(_CHUNK_NBYTES, max(4096, self.nbytes // (2 * _BUFFERS * self.threads)))


def stream(
    source: Source,
    targets: Mapping[str, Target],
    budget: Budget,
    timings: Timings,
    extra_nbytes: Callable[[torch.device], int] = lambda device: 0,
) -> Iterator[list[Piece]]:
    """Yield the tensors named in `targets` in stored order, neighbours together; devices take turns.

    On a GPU the pieces are ready for work on the current stream. What lies in no plain bytes, such as a legacy pickle
    or a model in memory, comes last, as views that `source.read` gives, where they are. Whatever was opened is closed
    at the end, also at an early one.

    Args:
        budget: threads, and bytes of temporary memory at once.
        timings: gets "read" (seconds of all threads in reads), "copy" (of all threads waiting for copies to a GPU) and
            "wait" (of the consumer, for both). Where there are codes with scales, "decode" gets the bytes of their
            numbers, and the seconds in which the consumer makes them; on a GPU those to queue it.
        extra_nbytes: bytes beyond the budget that may be used on a GPU now, such as those that results will take later.

    Raises:
        CheckpointError: a file cannot be read, or is not what it was when the checkpoint was opened.
    """
    wanted = [stored for name, stored in source.tensors.items() if name in targets]
    runs = make_runs((stored for stored in wanted if stored.spans), targets, budget.run_nbytes)
    with _short_turns():
        yield from _Reader(take_turns(runs), budget, timings, extra_nbytes).pieces()
    for name, tensor in source.read([stored.name for stored in wanted if not stored.spans]):
        yield [Piece(source.tensors[name], 0, tensor, is_temporary=not source.in_place)]


@contextmanager
def _short_turns() -> Iterator[None]:
    """Shorten the interval after which a thread gives up Python's lock: 16 GB take 12 threads 0.69 s instead of 0.82.

    The interval belongs to the process. If it is short already, as during a load in another thread, nothing changes.
    """
    before = sys.getswitchinterval()
    if before <= _TURN_S:
        yield
        return
    try:
        sys.setswitchinterval(_TURN_S)
        yield
    finally:
        sys.setswitchinterval(before)  # a function in C: an interrupt comes after it, and not before


class _Reader:
    """Threads that read chunks, and a consumer that starts runs within the budget and takes them in order."""

    def __init__(
        self,
        runs: Iterable[Run],
        budget: Budget,
        timings: Timings,
        extra_nbytes: Callable[[torch.device], int],
    ) -> None:
        self.runs, self.budget, self.extra_nbytes, self.timings = deque(runs), budget, extra_nbytes, timings
        self.sources: dict[int, ByteSource] = {}  # those that are open, by identity
        self.unread = Counter(key for run in self.runs for key in run.sources)  # runs, of each source
        self.links: dict[torch.device, Link] = {}
        self.work: SimpleQueue[Chunk | None] = SimpleQueue()
        self.errors: dict[Run, tuple[int, BaseException]] = {}  # of its first chunk that failed, and where that starts
        self.lock = Lock()  # of `errors`
        self.is_closing = False
        self.threads = [Worker(self._run) for _ in range(budget.threads)]

    def pieces(self) -> Iterator[list[Piece]]:
        in_flight: deque[Run] = deque()
        in_use = 0
        try:
            for thread in self.threads if self.runs else ():
                thread.start()
            while self.runs or in_flight:
                while self.runs and (not in_flight or self._may_start(self.runs[0], in_flight, in_use)):
                    in_flight.append(self._start(self.runs.popleft()))
                    in_use += in_flight[-1].temporary_nbytes
                run = in_flight.popleft()
                with self.timings.timed("wait"):
                    run.handed_over.wait()
                if run in self.errors:
                    raise self.errors[run][1]
                if run.target.device in self.links:
                    self.links[run.target.device].arrive()
                pieces = self._pieces(run)
                in_use -= run.temporary_nbytes
                self._close_what_is_read(run)
                del run  # or it would keep the memory while the consumer makes what replaces it
                yield pieces
                del pieces
        finally:
            try:
                self._close()
            except BaseException:  # also an interrupt as it is entered
                to_the_end(self._close)
                raise

    def _close_what_is_read(self, run: Run) -> None:
        """Close the sources that no later run reads: a checkpoint may have more files than a process may open."""
        for key in run.sources:
            self.unread[key] -= 1
            if not self.unread[key]:
                self.sources.pop(key).close()

    def _close(self) -> None:
        """End the threads and close the files."""
        self.is_closing = True  # threads drop what is left
        for _ in self.threads:
            self.work.put(None)
        for thread in self.threads:
            thread.join()
        for source in self.sources.values():
            source.close()
        self.errors.clear()  # their tracebacks hold this object, and with it what threads read into

    def _may_start(self, run: Run, in_flight: Iterable[Run], in_use: int) -> bool:
        if len(self.sources) >= _MAX_OPEN and not self.sources.keys() >= run.sources.keys():
            return False
        # One run is decoded at a time. If each had room for its numbers, four of MXFP4 with 32 MiB of codes would fill
        # 768 MiB: 8 chunks for 12 threads.
        decoded_nbytes = max(each.decoded_nbytes for each in (run, *in_flight))
        needed = in_use + run.temporary_nbytes + decoded_nbytes
        return needed <= self.budget.nbytes + self.extra_nbytes(run.target.device)

    def _pieces(self, run: Run) -> list[Piece]:
        if not run.decoded_nbytes:
            return run.pieces()
        with self.timings.timed("decode", run.decoded_nbytes):
            return run.pieces()

    def _start(self, run: Run) -> Run:
        for source, _, _ in run.spans:
            if id(source) not in self.sources:
                if source.path is not None:  # a file that is gone or changed is an error before memory is made for it
                    open_unchanged(source.path, source.nbytes, source.identity).close()
                self.sources[id(source)] = source
        self.sources |= run.sources
        chunks, device = run.start(self.budget.chunk_nbytes), run.target.device
        if device.type == "cuda":
            if device not in self.links:
                self.links[device] = Link(device)
            self.links[device].depart()
        for chunk in chunks:
            self.work.put(chunk)
        return run

    def _run(self) -> None:
        mover = _Mover(self.links, self.budget.chunk_nbytes)
        while (chunk := self.work.get()) is not None:
            run = chunk.run
            try:
                if not self.is_closing:
                    mover.move(chunk)
            except BaseException as error:  # handed to the consumer, which raises it
                self._keep(error, chunk)
            run.chunk_done()
            del chunk, run  # or an idle thread would keep the memory alive
        mover.finish(self.timings)

    def _keep(self, error: BaseException, chunk: Chunk) -> None:
        """Keep the error of the first bytes of a run that fail, whichever thread is the first to fail.

        A file that was cut short fails in every chunk after its end, and only the first of them says where it ended.
        """
        with self.lock:
            if chunk.run not in self.errors or chunk.start < self.errors[chunk.run][0]:
                self.errors[chunk.run] = chunk.start, error


class _Mover:
    """What one thread needs to move chunks; Python's lock is what the threads wait for, so little is done a chunk."""

    def __init__(self, links: Mapping[torch.device, Link], chunk_nbytes: int) -> None:
        self.links, self.chunk_nbytes = links, chunk_nbytes
        self.buffers: deque[StagingBuffer] = deque()
        self.current: torch.cuda.Stream | None = None
        self.read_s, self.read_nbytes, self.copy_s, self.copy_nbytes = 0.0, 0, 0.0, 0

    def move(self, chunk: Chunk) -> None:
        """Read a chunk and queue its copy to the GPU, if it goes to one."""
        memory, link = chunk.memory, self.links.get(chunk.run.target.device)
        if link is None:
            self._read(chunk, memory_of(memory))
            return
        if link.stream is not self.current:
            torch.cuda.set_stream(link.stream)  # of this thread only, and with it the GPU that pins a buffer
            self.current = link.stream
        buffer, nbytes = self._free_buffer(), len(memory)
        self._read(chunk, buffer.bytes[:nbytes])
        buffer.copy_to(memory, link)
        self.copy_nbytes += nbytes

    def finish(self, timings: Timings) -> None:
        """Wait for the copies, and add up what all chunks took."""
        for buffer in self.buffers:
            buffer.wait()
        timings.add("read", self.read_s, self.read_nbytes)
        if self.copy_nbytes:
            timings.add("copy", self.copy_s, self.copy_nbytes)

    def _free_buffer(self) -> StagingBuffer:
        if len(self.buffers) < _BUFFERS:
            self.buffers.append(StagingBuffer(self.chunk_nbytes))
        else:
            self.buffers.rotate(-1)
        began = time.perf_counter()
        self.buffers[-1].wait()
        self.copy_s += time.perf_counter() - began
        return self.buffers[-1]

    def _read(self, chunk: Chunk, buffer: memoryview) -> None:
        began, at = time.perf_counter(), 0
        for source, offset, nbytes in chunk.spans:
            try:
                source.read_into(buffer[at : at + nbytes], offset)
            except ReadError as error:
                raise error.in_tensor(chunk.run.name_at(chunk.start + at + error.at - offset)) from error
            at += nbytes
        self.read_s += time.perf_counter() - began
        self.read_nbytes += at
