"""Transfer: copy the tensors of a block from where they are stored into one buffer on a device, in few copies.

Memory is copied by the device, from pinned memory without the host waiting. A file is read by a few threads: into the
buffer itself on the CPU, through a little pinned memory to a GPU. Reading by descriptor rather than through the map
makes a file that was cut short an error and no SIGBUS.
"""

import mmap
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from operator import is_

import torch
from torch import Tensor

from bigq.formats import TensorSpec
from bigq.offload.readers import Read, Readers
from bigq.offload.space import FileMap, OffloadSpace, is_edited, mapping_of
from bigq.system.internals import edits_of
from bigq.system.memory import ALIGNMENT, align

__all__ = ["Layout", "Transfer"]

_CHUNK_NBYTES = 4 << 20  # of a file at a time: all threads end a block at nearly the same time
_CHUNKS = 2  # pinned ones a thread: one is filled while the other is copied


@dataclass(kw_only=True)
class _Extent:
    """Bytes that are stored together, at `offset` of `mapping` or as `memory`; in the buffer they begin at `start`.

    `file` is the one that `memory` is a map of: the bytes were edited, which its descriptor does not show.
    """

    mapping: mmap.mmap | None
    offset: int
    start: int
    nbytes: int
    memory: Tensor | None = None
    file: FileMap | None = None


class Layout:
    """Where each of `tensors` comes to lie in one buffer of `nbytes`, and the extents that fill it.

    Holds for as long as the tensors are what they are now: see `is_current`. `on_host` says that all of them are there,
    where no stream has to be waited for.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tuple(tensors)
        self.on_host = all(tensor.device.type == "cpu" for tensor in tensors)
        self._addresses = [tensor.data_ptr() for tensor in tensors]
        self._versioned = [tensor for tensor in tensors if not tensor.is_inference()]
        self._versions = list(map(edits_of, self._versioned))
        self.extents: list[_Extent] = []
        self.nbytes = 0
        starts: dict[int, int] = {}
        for tensor, place in _in_stored_order(tensors):
            starts[id(tensor)] = self._add(tensor.detach(), place)
        for extent in self.extents:
            if extent.mapping is not None and not isinstance(extent.mapping, FileMap):
                extent.memory = torch.frombuffer(
                    extent.mapping, dtype=torch.uint8, count=extent.nbytes, offset=extent.offset
                )
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
        last = self.extents[-1] if self.extents else None
        if last is not None and mapping is not None and mapping is last.mapping:
            distance = offset - last.offset
            if distance % ALIGNMENT == 0 and distance <= align(last.nbytes):  # next to it, or within it
                last.nbytes = max(last.nbytes, distance + tensor.nbytes)
                self.nbytes = last.start + last.nbytes
                return last.start + distance
        extent = _Extent(mapping=mapping, offset=offset, start=align(self.nbytes), nbytes=tensor.nbytes)
        if mapping is None:
            held = mapping_of(tensor)
            if held is not None and isinstance(held[0], FileMap):
                extent.file = held[0]
                extent.file.refuse_cut_short()  # the next line may read
            extent.memory = tensor.contiguous().reshape(-1).view(torch.uint8)
        self.extents.append(extent)
        self.nbytes = extent.start + extent.nbytes
        return extent.start


class Transfer:
    """Fills buffers on `device` from layouts; the threads that read files start with the first one to read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._readers = Readers()

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

    def start(self, layout: Layout, buffer: Tensor, stream: torch.cuda.Stream | None) -> list[Read]:
        """Queue the copies of `layout` into `buffer` on `stream`; those from files are queued once the reads are done.

        If it raises, some of the copies and reads may be under way: nothing else may be written to `buffer` then.
        """
        reads: list[Read] = []
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            for extent in layout.extents:
                if extent.memory is not None:
                    if extent.file is not None:
                        extent.file.refuse_cut_short()  # a file that is too short makes reading its map a SIGBUS
                    buffer[extent.start : extent.start + extent.nbytes].copy_(extent.memory, non_blocking=True)
                else:
                    reads += _reads(extent, buffer, stream)
        self._readers.start(reads)
        return reads


def _reads(extent: _Extent, buffer: Tensor, stream: torch.cuda.Stream | None) -> list[Read]:
    assert isinstance(extent.mapping, FileMap)
    starts = range(0, extent.nbytes, _CHUNK_NBYTES)
    return [
        Read(
            partial(
                _read_chunk,
                extent.mapping,
                extent.offset + at,
                buffer,
                extent.start + at,
                min(_CHUNK_NBYTES, extent.nbytes - at),
                stream,
            )
        )
        for at in starts
    ]


_pinned = threading.local()  # chunks of a reading thread


def _read_chunk(
    file: FileMap, offset: int, buffer: Tensor, start: int, nbytes: int, stream: torch.cuda.Stream | None
) -> None:
    if stream is None:
        file.read(offset, buffer[start : start + nbytes])
        return
    if not hasattr(_pinned, "ring"):
        _pinned.ring = deque(_new_chunk() for _ in range(_CHUNKS))
    chunk, copied = _pinned.ring[0]
    _pinned.ring.rotate(-1)
    copied.synchronize()  # the copy that last used this chunk
    file.read(offset, chunk[:nbytes])
    with torch.cuda.stream(stream):
        buffer[start : start + nbytes].copy_(chunk[:nbytes], non_blocking=True)
        copied.record(stream)


def _new_chunk() -> tuple[Tensor, torch.cuda.Event]:
    pinned = torch.empty(_CHUNK_NBYTES, dtype=torch.uint8, pin_memory=True)
    return pinned, torch.cuda.Event()  # type: ignore[no-untyped-call]


def _in_stored_order(tensors: Sequence[Tensor]) -> list[tuple[Tensor, tuple[mmap.mmap, int] | None]]:
    """Each of `tensors` once, those that are stored side by side next to each other."""
    unique = {id(tensor): tensor for tensor in tensors if tensor.numel()}
    placed = [(tensor, _fetched_from(tensor)) for tensor in unique.values()]
    return sorted(placed, key=lambda entry: (id(entry[1][0]), entry[1][1]) if entry[1] else (0, 0))


def _fetched_from(tensor: Tensor) -> tuple[mmap.mmap, int] | None:
    place = mapping_of(tensor)
    if place is None or not tensor.is_contiguous():
        return None
    return None if is_edited(tensor, place[0]) else place


def _is_fetchable(tensor: Tensor) -> bool:
    return _fetched_from(tensor) is not None or (tensor.is_pinned() and tensor.is_contiguous())
