"""DeviceSlot: preallocated memory on a device that holds the copies of one block at a time.

An interrupt may come at any bytecode, so what says that a copy is complete is written last. A slot whose copy was
interrupted before all of it was queued is spoiled: nobody knows what will yet be written to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bigq.offload.readers import Read
from bigq.offload.transfer import Layout, Transfer
from bigq.system.internals import count_holders

__all__ = ["DeviceSlot"]


@dataclass(kw_only=True)
class _Copy:
    """A copy of all tensors of `layout` that is not known to be complete; `reads` are those from files."""

    layout: Layout
    reads: Sequence[Read] = ()
    is_queued: bool = False


class DeviceSlot:
    """A buffer of `nbytes` on `device`, and the layout whose copies it holds."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.turn = 0  # of the last copy or use
        self._layout: Layout | None = None  # all of it is here, or is once `_copied` has happened
        self._copy: _Copy | None = None  # under way
        self._copied: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None  # on which it was filled last
        self._used: dict[torch.cuda.Stream, torch.cuda.Event] = {}  # what has to happen before it is written again
        self._uses: dict[torch.cuda.Stream, torch.cuda.Event] = {}
        self._made: WeakKeyDictionary[Layout, list[Tensor]] = WeakKeyDictionary()
        self._tensors: list[Tensor] = []  # over the buffer, of the layout in use
        self._holders = count_holders(self.buffer, self._tensors)

    @property
    def is_spoiled(self) -> bool:
        """Whether a copy was interrupted so that its reads may still write here; the slot is of no use then."""
        return self._copy is not None and not self._copy.is_queued

    def holds(self, layout: Layout) -> bool:
        """Whether the copies of `layout` are here, or on their way."""
        return self._layout is layout or (
            self._copy is not None and self._copy.is_queued and self._copy.layout is layout
        )

    def fill(self, layout: Layout, transfer: Transfer, stream: torch.cuda.Stream | None) -> None:
        """Start to copy the tensors of `layout` here, once what was done with the slot before is done."""
        self._layout = None
        self.wait_for_reads()  # of a copy that was never used
        if stream is not None:
            for event in self._used.values():
                stream.wait_event(event)
        self._used, self._stream = {}, stream
        self._copy = copy = _Copy(layout=layout)
        copy.reads = transfer.start(layout, self.buffer, stream)
        self._mark_copied()
        copy.is_queued = True

    def finish(self) -> None:
        """Wait for reads from files, if there are any. Raises what went wrong there; the slot then holds nothing."""
        copy = self._copy
        if copy is None:
            return
        self.wait_for_reads()
        failed = next((read for read in copy.reads if read.error is not None), None)
        if failed is not None:
            self._copy = None
            failed.raise_error()
        if copy.reads:
            self._mark_copied()
        self._layout = copy.layout
        self._copy = None

    def wait_for_reads(self) -> None:
        """Return when no thread writes here any more."""
        for read in self._copy.reads if self._copy is not None else ():
            read.wait()

    def wait_for_copies(self) -> None:
        """Let the current stream wait for the copies that are queued."""
        if self._copied is not None:
            torch.cuda.current_stream(self.buffer.device).wait_event(self._copied)

    def tensors_of(self, layout: Layout) -> list[Tensor]:
        """Frozen tensors over the buffer; the same ones each time, since compiled code and replays know them again."""
        if layout not in self._made:
            self._made[layout] = self._make_tensors(layout)
        self._tensors = self._made[layout]
        self._holders = count_holders(self.buffer, self._tensors)
        return self._tensors

    def mark_used(self, stream: torch.cuda.Stream) -> None:
        """Note that the buffer is free once the work that `stream` has now is done."""
        if stream not in self._uses:
            self.buffer.record_stream(stream)
            self._uses[stream] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._uses[stream].record(stream)
        self._used[stream] = self._uses[stream]

    def has_escaped(self) -> bool:
        """Whether a tensor over the buffer, or a view of one, outlives the call, or may do so."""
        return self._holders is None or count_holders(self.buffer, self._tensors) != self._holders

    def _mark_copied(self) -> None:
        """Note that the buffer is filled once the copies queued so far are done."""
        if self._stream is not None:
            self._copied = self._copied or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(self._stream)

    def _make_tensors(self, layout: Layout) -> list[Tensor]:
        made: dict[int, Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            for own, start in zip(layout.tensors, layout.starts, strict=True):
                if id(own) not in made:
                    view = self.buffer[start : start + own.nbytes].view(own.dtype).view(own.shape)
                    made[id(own)] = nn.Parameter(view, requires_grad=False) if isinstance(own, nn.Parameter) else view
        return [made[id(own)] for own in layout.tensors]
