"""stream: read tensors with several threads, each straight to the device that works on it.

A file is read in file order, in chunks. What goes to a GPU passes through a small ring of pinned memory, each byte
once, while the chunks before it are copied; what stays on the CPU is read into place. Nothing is mapped, so a file that
is cut short meanwhile is an error and no SIGBUS.
"""

import ctypes
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread

import torch
from torch import Tensor

from bigq.checkpoint import Checkpoint, TensorInfo
from bigq.errors import CheckpointError
from bigq.model_tensors import ModelTensors

__all__ = ["Source", "stream"]

Source = Checkpoint | ModelTensors

_CHUNK_NBYTES = 16 << 20  # a pinned copy of 16 MiB reaches 97 % of the link's rate, one of 1 MiB 87 %
_SLOTS = 2  # pinned chunks a thread: one is filled while the other is copied
_BUDGET_NBYTES = 512 << 20  # of tensors on their way, besides the one that the consumer holds


def stream(
    source: Source, names: Collection[str], receive: Callable[[TensorInfo], Tensor]
) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield (name, tensor, owned) in file order.

    `receive` makes the memory that a tensor is read into, contiguous and on the device that works on it. `owned` says
    that it was used; otherwise the tensor is a view of a file or the model's own parameter, wherever that is. On a GPU
    the tensor is ready for work on the current stream.

    Raises:
        CheckpointError: a file cannot be read, or is not what it was when the checkpoint was opened.
    """
    if isinstance(source, ModelTensors):
        for name, tensor in source.read(names):
            yield name, tensor, False
        return
    laid_out = [name for name in names if source.tensors[name].offset is not None]
    if laid_out:
        yield from _Reader(source, laid_out, receive).tensors()
    for name, tensor in source.read([name for name in names if source.tensors[name].offset is None]):
        yield name, tensor, False


class _Pending:
    """A tensor on its way: `bytes` is its memory, `chunks` counts what has not been handed to the device yet."""

    def __init__(self, info: TensorInfo, tensor: Tensor) -> None:
        self.info = info
        self.tensor = tensor
        self.bytes = self.tensor.reshape(-1).view(torch.uint8)
        self.starts = range(0, info.nbytes, _CHUNK_NBYTES)
        self.chunks = len(self.starts)
        self.lock, self.handed_over = Lock(), Event()
        self.copied: list[torch.cuda.Event] = []
        self.free: torch.cuda.Event | None = None
        if tensor.is_cuda:  # the allocator may have given memory that work queued earlier still uses
            self.free = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.free.record(torch.cuda.current_stream(tensor.device))
        if not self.chunks:
            self.handed_over.set()

    def chunk_done(self, copied: torch.cuda.Event | None) -> None:
        with self.lock:
            self.chunks -= 1
            if copied is not None:
                self.copied.append(copied)
            if not self.chunks:
                self.handed_over.set()


class _Reader:
    """Threads that read chunks, and a consumer that starts tensors within the budget and takes them in order."""

    def __init__(self, checkpoint: Checkpoint, names: Collection[str], receive: Callable[[TensorInfo], Tensor]) -> None:
        positions = {name: position for position, name in enumerate(checkpoint.tensors)}
        self.infos = deque(checkpoint.tensors[name] for name in sorted(names, key=positions.__getitem__))
        self.checkpoint, self.receive = checkpoint, receive
        self.files: dict[Path, int] = {}
        self.work: SimpleQueue[tuple[_Pending, int] | None] = SimpleQueue()
        self.error: BaseException | None = None
        self.threads = [Thread(target=self._run, daemon=True) for _ in range(_thread_count())]

    def tensors(self) -> Iterator[tuple[str, Tensor, bool]]:
        in_flight: deque[_Pending] = deque()
        nbytes = 0
        try:
            for thread in self.threads:
                thread.start()
            while self.infos or in_flight:
                while self.infos and (not in_flight or nbytes + self.infos[0].nbytes <= _BUDGET_NBYTES):
                    in_flight.append(self._start(self.infos.popleft()))
                    nbytes += in_flight[-1].info.nbytes
                pending = in_flight.popleft()
                pending.handed_over.wait()
                if self.error is not None:
                    raise self.error
                name, tensor = pending.info.name, pending.tensor
                for copied in pending.copied:
                    torch.cuda.current_stream(tensor.device).wait_event(copied)
                nbytes -= pending.info.nbytes
                del pending  # or it would keep the tensor while the consumer replaces it
                yield name, tensor, True
                del tensor
        finally:
            self.error = self.error or GeneratorExit()  # threads drop what is left
            for _ in self.threads:
                self.work.put(None)
            for thread in self.threads:
                thread.join()
            for descriptor in self.files.values():
                os.close(descriptor)

    def _start(self, info: TensorInfo) -> _Pending:
        if info.file not in self.files:
            self.files[info.file] = _open(info.file, self.checkpoint.file_nbytes[info.file])
        pending = _Pending(info, self.receive(info))
        for start in pending.starts:
            self.work.put((pending, start))
        return pending

    def _run(self) -> None:
        slots = deque[tuple[Tensor, torch.cuda.Event]]()
        streams: dict[torch.device, torch.cuda.Stream] = {}
        while (job := self.work.get()) is not None:
            pending, start = job
            copied = None
            try:
                if self.error is None:
                    copied = self._move(pending, start, slots, streams)
            except BaseException as error:  # handed to the consumer, which raises it
                self.error = self.error or error
            pending.chunk_done(copied)
            del job, pending  # or an idle thread would keep the tensor alive
        for _, event in slots:
            event.synchronize()

    def _move(
        self,
        pending: _Pending,
        start: int,
        slots: deque[tuple[Tensor, torch.cuda.Event]],
        streams: dict[torch.device, torch.cuda.Stream],
    ) -> torch.cuda.Event | None:
        """Read one chunk; returns the event of its copy to a GPU."""
        info, target = pending.info, pending.bytes[start : start + _CHUNK_NBYTES]
        assert info.offset is not None
        if pending.free is None:
            self._read(info, info.offset + start, target)
            return None
        if len(slots) < _SLOTS:
            pinned = torch.empty(_CHUNK_NBYTES, dtype=torch.uint8, pin_memory=True)
            slots.append((pinned, torch.cuda.Event()))  # type: ignore[no-untyped-call]
        slot, event = slots.popleft()
        event.synchronize()  # the copy that last used this slot
        self._read(info, info.offset + start, slot[: len(target)])
        device = target.device
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(streams[device]):
            streams[device].wait_event(pending.free)
            target.copy_(slot[: len(target)], non_blocking=True)
            event.record()
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        slots.append((slot, event))
        return copied

    def _read(self, info: TensorInfo, offset: int, into: Tensor) -> None:
        buffer = memoryview((ctypes.c_char * len(into)).from_address(into.data_ptr())).cast("B")
        done = 0
        while done < len(into):
            try:
                got = os.preadv(self.files[info.file], [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read tensor {info.name!r} of {info.file}: {error}") from error
            if not got:
                raise CheckpointError(
                    f"{info.file} ended at byte {offset + done}, in the middle of tensor {info.name!r}: "
                    "it was cut short while it was read"
                )
            done += got


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


def _thread_count() -> int:
    """Eight threads saturate a PCIe 5 link from the page cache; more than the process may run at once help nobody."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores))
