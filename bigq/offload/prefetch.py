"""Prefetcher: lends blocks device copies of their offloaded tensors, made ahead of use on a stream of their own.

Copies live in a few preallocated slots. Streams wait for each other by events; the host waits only for files.
Which block comes next is what came next the last time, at first the order of the model: a wrong guess costs time, and
never a result. When every slot is in use (recursion, nested blocks, threads) a call gets memory of its own.
"""

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bigq.model.tree import assign_tensor, tensor_table
from bigq.offload.saved_tensors import saved_at_rest
from bigq.offload.transfer import Layout, Transfer
from bigq.system.internals import can_hook_saved_tensors, count_holders

__all__ = ["Block", "Prefetcher"]


class Block:
    """Tensors that are lent together: `borrowed` is (owner, name) of each.

    `ahead` says that they are copied before they are needed; those of a module around other blocks are not, because
    they would occupy a slot for the length of all of their calls.
    """

    def __init__(self, borrowed: Iterable[tuple[nn.Module, str]], *, ahead: bool) -> None:
        self.borrowed = list(borrowed)
        self.ahead = ahead
        self._start()

    def _start(self) -> None:
        self.layout: Layout | None = None
        self.slot: _Slot | None = None  # what it is lent, while `calls` is positive
        self.calls = 0

    @cached_property
    def _tables(self) -> list[tuple[dict[str, Any], str]]:
        """The dicts of the owners themselves: nn.Module's own lookup takes longer than all the rest of a call."""
        return [(tensor_table(owner, name), name) for owner, name in self.borrowed]

    @cached_property
    def _in_lists(self) -> list[int]:
        return [i for i, (owner, _) in enumerate(self.borrowed) if isinstance(owner, nn.RNNBase)]

    def tensors(self) -> list[Tensor]:
        """What the modules hold now: outside of a call, the tensors at rest."""
        return [table[name] for table, name in self._tables]

    def assign(self, tensors: Sequence[Tensor]) -> None:
        for (table, name), tensor in zip(self._tables, tensors, strict=True):
            table[name] = tensor
        for i in self._in_lists:  # an RNN keeps a second list of its weights
            assign_tensor(*self.borrowed[i], tensors[i])

    def __getstate__(self) -> dict[str, Any]:
        return {"borrowed": self.borrowed, "ahead": self.ahead}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


class _Slot:
    """A buffer on the device, and the block whose copies it holds."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.layout: Layout | None = None
        self.stream: torch.cuda.Stream | None = None  # on which it was filled last
        self.reads: list[Future[None]] = []  # from files, which have to end before the copies are all queued
        self.copied: torch.cuda.Event | None = None
        self.used: dict[torch.cuda.Stream, torch.cuda.Event] = {}  # what has to happen before it is written again
        self.lent = False
        self.turn = 0  # of the last copy or use
        self._uses: dict[torch.cuda.Stream, torch.cuda.Event] = {}
        self._lendable: WeakKeyDictionary[Layout, list[Tensor]] = WeakKeyDictionary()
        self._tensors: list[Tensor] = []  # what is lent
        self._holders = count_holders(self.buffer, self._tensors)

    def lend(self, layout: Layout) -> list[Tensor]:
        """Frozen tensors over the buffer; the same ones each time, since compiled code and replays know them again."""
        if layout not in self._lendable:
            self._lendable[layout] = self._make_tensors(layout)
        self.lent, self._tensors = True, self._lendable[layout]
        self._holders = count_holders(self.buffer, self._tensors)
        return self._tensors

    def mark_used(self, stream: torch.cuda.Stream) -> None:
        """Note that the buffer is free once the work that `stream` has now is done."""
        if stream not in self._uses:
            self._uses[stream] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.buffer.record_stream(stream)
        self._uses[stream].record(stream)
        self.used[stream] = self._uses[stream]

    def mark_copied(self) -> None:
        """Note that the buffer is filled once the copies queued so far are done."""
        if self.stream is not None:
            self.copied = self.copied or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.copied.record(self.stream)

    def finish(self) -> None:
        """Wait for the reads from files, if there are any; raises what went wrong there, and then holds nothing."""
        if not self.reads:
            return
        layout, self.layout = self.layout, None
        reads, self.reads = self.reads, []
        wait(reads)
        for read in reads:
            read.result()
        self.layout = layout
        self.mark_copied()

    def _make_tensors(self, layout: Layout) -> list[Tensor]:
        made: dict[int, Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            for own, start in zip(layout.tensors, layout.starts, strict=True):
                if id(own) not in made:
                    view = self.buffer[start : start + own.nbytes].view(own.dtype).view(own.shape)
                    made[id(own)] = nn.Parameter(view, requires_grad=False) if isinstance(own, nn.Parameter) else view
        return [made[id(own)] for own in layout.tensors]

    def has_escaped(self) -> bool:
        """Whether anything that was lent, or a view of it, outlives the call, or may do so."""
        return self._holders is None or count_holders(self.buffer, self._tensors) != self._holders


class Prefetcher:
    """One for all offloaded blocks that run on `device` in one model.

    Args:
        device: where blocks run.
        slots: how many blocks have their copies on the device at a time.
    """

    def __init__(self, device: torch.device, *, slots: int = 2) -> None:
        self.device = device
        self.blocks: list[Block] = []
        self._max_slots = slots
        self._next: dict[Block, Block] = {}
        self._start()

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._last = threading.local()  # the block that a thread entered last
        self._slots: list[_Slot] | None = None
        self._turn = 0
        self._transfer = Transfer(self.device)
        self._stream: torch.cuda.Stream | None = None

    def __getstate__(self) -> dict[str, Any]:
        kept = ("device", "blocks", "_max_slots", "_next")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __del__(self) -> None:
        if getattr(self, "_stream", None) is not None:
            self._stream.synchronize()  # type: ignore[union-attr]  # the memory of a copy made ahead is freed next

    def add(self, block: Block) -> None:
        """Make `block` known; blocks are expected to run in the order in which they are added, over and over."""
        self.blocks.append(block)
        ahead = [block for block in self.blocks if block.ahead]
        self._next = dict(zip(ahead, ahead[1:] + ahead[:1], strict=True))

    def enter(self, block: Block) -> AbstractContextManager[object] | None:
        """Lend `block` its tensors, or share what is lent already, and start on the copies for what comes next.

        Returns a context for the block's computation, or None where it needs none. Every `enter` needs a `leave`.

        Raises:
            CheckpointError: a file that tensors rest in was cut short.
            PlacementError: there is no pinned memory for tensors that came without, as those of a deepcopy.
        """
        with self._lock:
            if not block.calls:
                self._lend(block)
            block.calls += 1
            slot, layout = block.slot, block.layout
            assert slot is not None
            assert layout is not None
            if slot.copied is not None:
                torch.cuda.current_stream(self.device).wait_event(slot.copied)
            try:
                if block.ahead:
                    self._follow(block)
            except BaseException:
                self.leave(block)
                raise
        if torch.is_grad_enabled() and can_hook_saved_tensors():
            return saved_at_rest(slot.buffer, layout, self._transfer)
        return None

    def leave(self, block: Block) -> None:
        """End a call; the last one to end gives the tensors back."""
        with self._lock:
            slot, layout = block.slot, block.layout
            assert slot is not None
            assert layout is not None
            if self.device.type == "cuda":
                slot.mark_used(torch.cuda.current_stream(self.device))
            block.calls -= 1
            if block.calls:
                return
            block.assign(layout.tensors)
            block.slot, slot.lent = None, False
            slot.turn = self._tick()
            if self._slots is not None and slot in self._slots and slot.has_escaped():
                # It would change with the next copy: the buffer is theirs now.
                self._slots[self._slots.index(slot)] = self._new_slot(slot.buffer.nbytes)

    def _lend(self, block: Block) -> None:
        layout = self._layout_of(block)
        slot = self._held(layout)
        if slot is None:
            slot = self._idle_slot(layout) if block.ahead and layout.on_host else None
            stream = self._stream
            if slot is None:
                slot = _Slot(layout.nbytes, self.device)
                stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
            self._copy(layout, slot, stream)
        slot.finish()
        block.assign(slot.lend(layout))
        block.slot = slot
        slot.turn = self._tick()

    def _layout_of(self, block: Block) -> Layout:
        tensors = block.tensors()
        if block.layout is None or not block.layout.is_current(tensors):
            self._transfer.pin(tensors)
            block.layout = Layout(tensors)
        return block.layout

    def _held(self, layout: Layout) -> _Slot | None:
        return next((slot for slot in self._slots or () if slot.layout is layout), None)

    def _idle_slot(self, layout: Layout) -> _Slot | None:
        """The slot that was not used for longest, if one is free and large enough."""
        if self._slots is None:
            sizes = [self._layout_of(block).nbytes for block in self.blocks if block.ahead and not block.calls]
            if self.device.type == "cuda":
                self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self._slots = [self._new_slot(max(sizes)) for _ in range(min(self._max_slots, len(sizes)))]
        idle = [slot for slot in self._slots if not slot.lent and slot.buffer.nbytes >= layout.nbytes]
        return min(idle, key=lambda slot: slot.turn, default=None)

    def _new_slot(self, nbytes: int) -> _Slot:
        slot = _Slot(nbytes, self.device)
        if self._stream is not None:
            slot.buffer.record_stream(self._stream)
            slot.mark_used(torch.cuda.current_stream(self.device))  # by the memory's former owner
        return slot

    def _copy(self, layout: Layout, slot: _Slot, stream: torch.cuda.Stream | None) -> None:
        wait(slot.reads)  # of a copy that nobody came for
        if stream is not None:
            for event in slot.used.values():
                stream.wait_event(event)
        slot.used, slot.layout, slot.stream = {}, layout, stream
        slot.reads = self._transfer.start(layout, slot.buffer, stream)
        slot.mark_copied()
        slot.turn = self._tick()

    def _follow(self, block: Block) -> None:
        """Learn what follows what, and copy ahead of `block` as far as there are idle slots."""
        last: Block | None = getattr(self._last, "block", None)
        if last is not None:
            self._next[last] = block
        self._last.block = block
        for _ in range(len(self._slots or ()) - 1):
            block = self._next[block]
            if block.calls or (block.layout is not None and self._held(block.layout)):
                continue
            layout = self._layout_of(block)
            slot = self._idle_slot(layout)
            if slot is None or not layout.on_host:
                return
            self._copy(layout, slot, self._stream)

    def _tick(self) -> int:
        self._turn += 1
        return self._turn
