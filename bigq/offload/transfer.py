"""Transfer: copy the tensors of a block from where they rest into one buffer on a device, in as few copies as they lie.

Memory is copied by the device, from pinned memory without the host waiting. A file is read by a few threads: into the
buffer itself on the CPU, through a little pinned memory to a GPU. Reading by descriptor rather than through the map
makes a file that was cut short an error and no SIGBUS.
"""

import mmap
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor

from bigq.formats import TensorSpec
from bigq.offload.space import ALIGNMENT, FileMap, OffloadSpace, align, locate
from bigq.system.internals import edits_of, version_of
from bigq.system.machine import usable_cores

__all__ = ["Layout", "Transfer"]

_CHUNK_NBYTES = 4 << 20  # of a file at a time: all threads end a block at nearly the same time
_STAGES = 2  # pinned chunks a thread: one is filled while the other is copied


@dataclass(kw_only=True)
class _Run:
    """Bytes that lie together at rest, at `offset` of `mapping` or as `memory`, and from `start` on in the buffer."""

    mapping: mmap.mmap | None
    offset: int
    start: int
    nbytes: int
    memory: Tensor | None = None


class Layout:
    """Where each of `tensors` comes to lie in one buffer of `nbytes`, and the runs that fill it.

    Holds for as long as the tensors are what they are now: see `is_current`. `on_host` says that all of them are there,
    where no stream has to be waited for.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tuple(tensors)
        self.on_host = all(tensor.device.type == "cpu" for tensor in tensors)
        self._addresses = [tensor.data_ptr() for tensor in tensors]
        self._versioned = [tensor for tensor in tensors if not tensor.is_inference()]
        self._versions = list(map(edits_of, self._versioned))
        self.runs: list[_Run] = []
        self.nbytes = 0
        starts: dict[int, int] = {}
        for tensor, place in _in_order_of_rest(tensors):
            starts[id(tensor)] = self._add(tensor.detach(), place)
        for run in self.runs:
            if run.mapping is not None and not isinstance(run.mapping, FileMap):
                run.memory = torch.frombuffer(run.mapping, dtype=torch.uint8, count=run.nbytes, offset=run.offset)
        self.starts = tuple(starts.get(id(tensor), 0) for tensor in tensors)

    def is_current(self, tensors: Sequence[Tensor]) -> bool:
        """Whether `tensors` are the ones laid out, and torch knows of no edit of them since."""
        return (  # in C loops: it is asked twice a call of a block, which may have hundreds of tensors
            all(map(is_, tensors, self.tensors))
            and list(map(Tensor.data_ptr, tensors)) == self._addresses
            and list(map(edits_of, self._versioned)) == self._versions
        )

    def _add(self, tensor: Tensor, place: tuple[mmap.mmap, int] | None) -> int:
        mapping, offset = place or (None, 0)
        last = self.runs[-1] if self.runs else None
        if last is not None and mapping is not None and mapping is last.mapping:
            distance = offset - last.offset
            if distance % ALIGNMENT == 0 and distance <= align(last.nbytes):  # next to it, or within it
                last.nbytes = max(last.nbytes, distance + tensor.nbytes)
                self.nbytes = last.start + last.nbytes
                return last.start + distance
        run = _Run(mapping=mapping, offset=offset, start=align(self.nbytes), nbytes=tensor.nbytes)
        if mapping is None:
            run.memory = tensor.contiguous().reshape(-1).view(torch.uint8)
        self.runs.append(run)
        self.nbytes = run.start + run.nbytes
        return run.start


class Transfer:
    """Fills buffers on `device` from layouts; the threads that read files start with the first one to read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._readers: ThreadPoolExecutor | None = None

    def pin(self, tensors: Sequence[Tensor]) -> None:
        """Move into pinned memory what a GPU would have to fetch from pageable memory, such as a deepcopy's tensors.

        The tensors stay the same objects. Does nothing where the device is a CPU.
        """
        if self.device.type != "cuda":
            return
        loose = {str(id(t)): t for t in tensors if t.device.type == "cpu" and t.numel() and not _is_fetchable(t)}
        if not loose:
            return
        specs = {name: TensorSpec(shape=tuple(t.shape), dtype=t.dtype) for name, t in loose.items()}
        space = OffloadSpace.pinned(specs)
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in loose.items():
                tensor.data = space.empty(name).copy_(tensor)

    def start(self, layout: Layout, buffer: Tensor, stream: torch.cuda.Stream | None) -> list[Future[None]]:
        """Queue the copies of `layout` into `buffer` on `stream`; those from files are, once the futures are done."""
        reads: list[Future[None]] = []
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            for run in layout.runs:
                if run.memory is not None:
                    buffer[run.start : run.start + run.nbytes].copy_(run.memory, non_blocking=True)
                else:
                    reads += self._read(run, buffer, stream)
        return reads

    def _read(self, run: _Run, buffer: Tensor, stream: torch.cuda.Stream | None) -> list[Future[None]]:
        assert isinstance(run.mapping, FileMap)
        if self._readers is None:
            self._readers = ThreadPoolExecutor(min(8, usable_cores()), thread_name_prefix="bigq-read")
        chunks = [(at, min(_CHUNK_NBYTES, run.nbytes - at)) for at in range(0, run.nbytes, _CHUNK_NBYTES)]
        return [
            self._readers.submit(_read_chunk, run.mapping, run.offset + at, buffer, run.start + at, nbytes, stream)
            for at, nbytes in chunks
        ]


_stages = threading.local()  # pinned chunks of a reading thread


def _read_chunk(
    file: FileMap, offset: int, buffer: Tensor, start: int, nbytes: int, stream: torch.cuda.Stream | None
) -> None:
    if stream is None:
        file.read(offset, buffer[start : start + nbytes])
        return
    if not hasattr(_stages, "ring"):
        _stages.ring = deque(_new_stage() for _ in range(_STAGES))
    stage, copied = _stages.ring[0]
    _stages.ring.rotate(-1)
    copied.synchronize()  # the copy that last used this stage
    file.read(offset, stage[:nbytes])
    with torch.cuda.stream(stream):
        buffer[start : start + nbytes].copy_(stage[:nbytes], non_blocking=True)
        copied.record(stream)


def _new_stage() -> tuple[Tensor, torch.cuda.Event]:
    pinned = torch.empty(_CHUNK_NBYTES, dtype=torch.uint8, pin_memory=True)
    return pinned, torch.cuda.Event()  # type: ignore[no-untyped-call]


def _in_order_of_rest(tensors: Sequence[Tensor]) -> list[tuple[Tensor, tuple[mmap.mmap, int] | None]]:
    """Each of `tensors` once, neighbours at rest next to each other."""
    unique = {id(tensor): tensor for tensor in tensors if tensor.numel()}
    placed = [(tensor, _fetched_from(tensor)) for tensor in unique.values()]
    return sorted(placed, key=lambda entry: (id(entry[1][0]), entry[1][1]) if entry[1] else (0, 0))


def _fetched_from(tensor: Tensor) -> tuple[mmap.mmap, int] | None:
    place = locate(tensor)
    if place is None or not tensor.is_contiguous():
        return None
    edited = isinstance(place[0], FileMap) and place[0].is_private and version_of(tensor) > 0
    return None if edited else place  # an edit of a private map is in memory only


def _is_fetchable(tensor: Tensor) -> bool:
    return _fetched_from(tensor) is not None or (tensor.is_pinned() and tensor.is_contiguous())
