"""Prefetcher: gives blocks device copies of their offloaded tensors, made ahead of use on a stream of their own.

Copies live in a few preallocated slots. Streams wait for each other by events; the host waits only for files.
Which block comes next is what came next the last time, at first the order of the model: a wrong guess costs time, and
never a result. When every slot is in use (recursion, nested blocks, threads) a call gets memory of its own.

An interrupt may come anywhere. A block keeps its own tensors beside it while copies stand in their place, and a call
ends with its object at the latest, so whatever was interrupted, the next call finds what it needs.
"""

import os
import threading
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from bigq.errors import UnsupportedError
from bigq.offload.block import OffloadedBlock
from bigq.offload.in_place import InPlace
from bigq.offload.saved_tensors import saved_offloaded
from bigq.offload.slot import DeviceSlot
from bigq.offload.transfer import Layout, Transfer
from bigq.system.internals import SEES_EDITS, can_hook_saved_tensors, functorch_transforms, saved_tensor_hooks
from bigq.system.interrupts import to_the_end

__all__ = ["Call", "Prefetcher"]


class Call:
    """A call of a block, from `Prefetcher.enter` on; it ends with `Prefetcher.leave`, or when nothing refers to it."""

    def __init__(self, prefetcher: "Prefetcher", block: OffloadedBlock, *, in_place: bool) -> None:
        self.prefetcher, self.block, self.in_place = prefetcher, block, in_place
        self.saving: saved_tensors_hooks | None = None  # what autograd saves in it goes through this

    @property
    def is_open(self) -> bool:
        return id(self) in self.block.calls

    def begin(self) -> None:
        """Let autograd save offloaded tensors in place of their copies, until the call ends."""
        if self.saving is not None:
            self.saving.__enter__()

    def end_saving(self) -> None:
        """Undo `begin`; does nothing the second time, or where an interrupt came before `begin`."""
        if self.saving is not None:
            top = saved_tensor_hooks()
            if top is not None and top[0] is self.saving.pack_hook:
                self.saving.__exit__()
            self.saving = None

    def __del__(self) -> None:
        if self.is_open:  # an interrupt came before it could be ended
            with suppress(BaseException):
                self.prefetcher.end(self)


class Prefetcher:
    """One for all offloaded blocks that run on `device` in one model.

    Args:
        device: where blocks run.
        slots: how many blocks have their copies on the device at a time.
    """

    def __init__(self, device: torch.device, *, slots: int = 2) -> None:
        self.device = device
        self.blocks: list[OffloadedBlock] = []
        self._max_slots = slots
        self._next: dict[OffloadedBlock, OffloadedBlock] = {}
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._last = threading.local()  # the block that a thread entered last
        self._slots: list[DeviceSlot] | None = None
        self._users: dict[DeviceSlot, OffloadedBlock] = {}  # the blocks whose calls use them
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

    def add(self, block: OffloadedBlock) -> None:
        """Make `block` known; blocks are expected to run in the order in which they are added, over and over."""
        self.blocks.append(block)
        ahead = [block for block in self.blocks if block.ahead]
        self._next = dict(zip(ahead, ahead[1:] + ahead[:1], strict=True))

    def enter(self, block: OffloadedBlock, *, in_place: bool = False) -> Call:
        """Give `block` the copies of its tensors, and start to copy those of the blocks that come next.

        Every `enter` needs a `leave` of the call that it returns. With `in_place`, experts in pinned memory are read
        there: they are not copied, neither for this block nor ahead for the next ones.

        Raises:
            CheckpointError: a file that holds offloaded tensors was cut short.
            UnsupportedError: torch.func computes derivatives.
            PlacementError: there is no pinned memory for tensors that came without, as those of a deepcopy.
        """
        if functorch_transforms():
            _refuse_without_memory()
        if self._process != os.getpid():  # locks, threads and calls of the parent do not survive a fork
            self._start()
            for known in self.blocks:
                known.forget_calls()
        call = Call(self, block, in_place=in_place)
        with self._lock:
            try:
                if not block.calls:
                    self._onload(block, in_place)
                block.calls.add(id(call))
                slot, layout = block.slot, block.copied
                assert slot is not None
                assert layout is not None
                slot.wait_for_copies()
                if block.ahead:
                    self._learn(block)
                    self._copy_ahead(call, len(self._slots or ()) - 1)
                if torch.is_grad_enabled() and can_hook_saved_tensors():
                    call.saving = saved_offloaded(slot.buffer, layout, self._transfer)
            except BaseException:
                to_the_end(partial(self._end, call))
                raise
        return call

    def read_anew(self, block: OffloadedBlock) -> InPlace:
        """Make what `block` reads in place anew, for the caches that its experts have now. No call of it may run."""
        with self._lock:
            block.put_back()
            block.in_place = None
            return self._in_place_of(block, self._layout_of(block))

    def leave(self, call: Call) -> None:
        """End a call, and start to copy another block into its slot.

        What runs next may need no copies, as the half of a model that is resident, and the link would be idle.
        """
        with self._lock:
            self.end(call)
            if call.block.ahead and not call.block.calls:
                with suppress(Exception):  # it comes again where the block is needed, and here would hide an output
                    self._copy_ahead(call, len(self._slots or ()))

    def end(self, call: Call) -> None:
        """End a call. The last one to end puts the offloaded tensors back."""
        with self._lock:
            to_the_end(partial(self._end, call))

    def _end(self, call: Call) -> None:
        call.end_saving()
        block, slot = call.block, call.block.slot
        if slot is not None and self.device.type == "cuda":
            slot.mark_used(torch.cuda.current_stream(self.device))
        block.calls.discard(id(call))
        if block.calls:
            return
        block.put_back()
        if slot is not None:
            slot.turn = self._tick()
            if self._slots is not None and slot in self._slots and slot.has_escaped():
                self._replace(slot)  # it would change with the next copy: the buffer is theirs now
            self._users.pop(slot, None)
            block.slot = None

    def _onload(self, block: OffloadedBlock, in_place: bool) -> None:
        block.put_back()
        layout = self._copied_layout(block, in_place)
        whole, read_in_place = block.layout, block.in_place  # where edits are not seen, `_idle_slot` makes others
        slot = self._held(layout)
        if slot is None:
            slot = self._idle_slot(layout) if block.ahead and layout.on_host and layout.nbytes else None
            stream = self._stream
            if slot is None:
                slot = DeviceSlot(layout.nbytes, self.device)
                stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
            self._fill(slot, layout, stream)
        self._users[slot], block.slot, block.copied = block, slot, layout
        slot.finish()
        copies = slot.tensors_of(layout)
        assert whole is not None
        if layout is not whole:
            assert read_in_place is not None
            copies = read_in_place.with_views(copies)
        block.use_copies(copies, whole.tensors)
        slot.turn = self._tick()

    def _copied_layout(self, block: OffloadedBlock, in_place: bool) -> Layout:
        """What is copied for a call of `block`: all of it, or with `in_place` what is not read where it is.

        All of it may be in a slot since another call, and stays there if there are no more blocks than slots.
        """
        whole = self._layout_of(block)
        if not in_place:
            return whole
        stays = len(self._next) <= self._max_slots or self._held(whole) is not None
        if stays and not (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return whole  # a CUDA graph that is captured cannot wait for a copy that was queued before
        return self._in_place_of(block, whole).layout

    def _in_place_of(self, block: OffloadedBlock, whole: Layout) -> InPlace:
        if block.in_place is None:
            block.in_place = InPlace(block.members, whole, self.device)
        return block.in_place

    def _layout_of(self, block: OffloadedBlock) -> Layout:
        tensors = block.tensors()
        if block.layout is None or not block.layout.is_current(tensors):
            self._transfer.pin(tensors)
            block.layout, block.in_place = Layout(tensors), None
        return block.layout

    def _held(self, layout: Layout) -> DeviceSlot | None:
        return next((slot for slot in self._slots or () if slot.holds(layout)), None)

    def _idle_slot(self, layout: Layout) -> DeviceSlot | None:
        """The slot that was not used for longest, if one is free and large enough."""
        if self._slots is None:
            own = [block for block in self.blocks if block.ahead and not block.calls]
            # A layout that is made again would not be the one that is being copied.
            sizes = [(block.layout or self._layout_of(block)).nbytes for block in own]
            if self.device.type == "cuda":
                self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self._slots = [self._new_slot(max(sizes)) for _ in range(min(self._max_slots, len(sizes)))]
        for slot in [slot for slot in self._slots if slot.is_spoiled]:
            self._replace(slot)
        idle = [slot for slot in self._slots if slot.buffer.nbytes >= layout.nbytes and not self._is_used(slot)]
        return min(idle, key=lambda slot: slot.turn, default=None)

    def _is_used(self, slot: DeviceSlot) -> bool:
        user = self._users.get(slot)
        if user is None or (user.calls and user.slot is slot):
            return user is not None
        user.put_back()  # an interrupt came before its last call could do it
        del self._users[slot]
        return False

    def _replace(self, slot: DeviceSlot) -> None:
        assert self._slots is not None
        self._slots[self._slots.index(slot)] = self._new_slot(slot.buffer.nbytes)

    def _new_slot(self, nbytes: int) -> DeviceSlot:
        slot = DeviceSlot(nbytes, self.device)
        if self._stream is not None:
            slot.buffer.record_stream(self._stream)
            slot.mark_used(torch.cuda.current_stream(self.device))  # by the memory's former owner
        return slot

    def _fill(self, slot: DeviceSlot, layout: Layout, stream: torch.cuda.Stream | None) -> None:
        slot.fill(layout, self._transfer, stream)
        slot.turn = self._tick()

    def _learn(self, block: OffloadedBlock) -> None:
        """Learn that `block` follows the one that this thread entered before."""
        last: OffloadedBlock | None = getattr(self._last, "block", None)
        if last is not None:
            self._next[last] = block
        self._last.block = block

    def _copy_ahead(self, call: Call, count: int) -> None:
        """Copy the `count` blocks that come after that of `call`, as far as there are idle slots."""
        if not SEES_EDITS:  # each copy counts as outdated: one made ahead is made again
            return
        block = call.block
        for _ in range(count):
            block = self._next[block]
            if block.calls:
                continue
            layout = block.layout
            if layout is None or self._held(layout) is None:
                layout = self._copied_layout(block, call.in_place)
            held = self._held(layout)
            if held is not None:
                held.turn = self._tick()  # not the one to give to the blocks after it
                continue
            if not layout.nbytes:
                continue
            slot = self._idle_slot(layout)
            if slot is None or not layout.on_host:
                return
            self._fill(slot, layout, self._stream)

    def _tick(self) -> int:
        self._turn += 1
        return self._turn


def _refuse_without_memory() -> None:
    """Raise an UnsupportedError where torch.func makes new tensors without memory: while it computes derivatives."""
    try:
        torch.empty(0, device="cpu").untyped_storage()
    except NotImplementedError as error:
        raise UnsupportedError(
            "an offloaded block is called while torch.func computes derivatives, where its copies would have no "
            "memory: call bigq.materialize(model) before, or take torch.autograd.grad"
        ) from error
