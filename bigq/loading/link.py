"""Link: the way of what is read to a GPU: pinned memory that threads read into, and one stream of copies from it."""

import torch
from torch import Tensor

from bigq.errors import PlacementError
from bigq.system.memory import memory_of
from bigq.system.pinned_memory import PinnedMemory

__all__ = ["Link", "StagingBuffer"]


class Link:
    """The stream on which all copies to one GPU are queued, and its order with the consumer's work on that GPU.

    One for all threads: a link carries one copy at a time, and each event of CUDA's costs a turn at Python's lock.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._departed, self._arrived = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]

    def depart(self) -> None:
        """Let copies wait for the work queued so far, which may still use what is now to be written."""
        self._departed.record(torch.cuda.current_stream(self.device))
        self.stream.wait_event(self._departed)

    def arrive(self) -> None:
        """Let work wait for the copies queued so far."""
        self._arrived.record(self.stream)
        torch.cuda.current_stream(self.device).wait_event(self._arrived)


class StagingBuffer:
    """Pinned memory for a chunk on its way to a GPU."""

    def __init__(self, nbytes: int) -> None:
        advice = "free some memory, raise the limit on locked memory, or lower read_budget"
        try:
            pinned = PinnedMemory.of(nbytes)
        except OSError as error:
            raise PlacementError(f"no {nbytes / 1e6:.1f} MB of host memory to read into: {error}; {advice}") from error
        if status := pinned.pin():
            raise PlacementError(
                f"cannot pin {nbytes / 1e6:.1f} MB of host memory to read into (CUDA error {status}): {advice}"
            )
        self.memory = pinned.bytes
        self.bytes = memory_of(self.memory)
        self._events: dict[Link, torch.cuda.Event] = {}  # an event belongs to a GPU
        self._copied: torch.cuda.Event | None = None

    def copy_to(self, memory: Tensor, link: Link) -> None:
        """Queue the copy of the first bytes to all of `memory`, on the current stream of this thread, the link's."""
        nbytes = len(memory)
        if link not in self._events:  # before the copy, which has to be waited for
            self._events[link] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        memory.copy_(self.memory if nbytes == len(self.memory) else self.memory[:nbytes], non_blocking=True)
        self._copied = self._events[link]
        self._copied.record(link.stream)

    def wait(self) -> None:
        """Return when the last copy is done, so that the buffer can be written again."""
        if self._copied is not None:
            self._copied.synchronize()
