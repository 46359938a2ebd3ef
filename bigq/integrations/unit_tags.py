"""Tags: the number of the unit that each process sends, which travels with its rows, so that no shards are mixed.

A process that skips a block, as LayerDrop does by chance, gathers another unit than the others from then on. Blocks are
alike, so the collective itself succeeds, and the weights would be made of rows of two blocks.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from bigq.errors import UnsupportedError

__all__ = ["TAG_NBYTES", "Tags", "tag_of"]

TAG_NBYTES = 256  # a number and a filling, so that what follows stays aligned
_ARRIVALS = 64  # gathers whose pinned memory is taken at once


def tag_of(index: int) -> Tensor:
    """The bytes that a process sends with the rows of a unit."""
    tag = torch.zeros(TAG_NBYTES, dtype=torch.uint8)
    tag.view(torch.int64)[0] = index
    return tag


class Tags:
    """What the processes have sent. A GPU's tags are looked at once they have come to the CPU, and nobody waits.

    Args:
        names: of the units, for the words of an error.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._on_their_way: deque[_Arrival] = deque()
        self._free: list[_Arrival] = []

    def arrive(self, index: int, tags: Tensor) -> None:
        """Compare the `tags` [processes, TAG_NBYTES] of unit `index`, which the current stream has or will have.

        A CUDA graph that is being captured replays one order, and its tags are not compared.
        """
        if tags.device.type == "cpu":
            self._compare(index, _numbers(tags).tolist())
        elif not torch.cuda.is_current_stream_capturing():
            if not self._free:
                # At once, as pinned memory cannot be had behind a gather that never ends.
                pinned = torch.empty(_ARRIVALS, *tags.shape, dtype=tags.dtype, device="cpu", pin_memory=True)
                self._free = [_Arrival(each) for each in pinned]
            arrival = self._free.pop()
            arrival.bring(index, tags)
            self._on_their_way.append(arrival)

    def check(self, *, wait: bool = False) -> None:
        """Compare what has come to the CPU since the last call; with `wait`, all that is on its way.

        Raises:
            UnsupportedError: a process has sent the rows of another unit.
        """
        if not self._on_their_way or torch.cuda.is_current_stream_capturing():
            return
        while self._on_their_way and (wait or self._on_their_way[0].is_there()):
            arrival = self._on_their_way.popleft()
            if wait:
                arrival.event.synchronize()
            self._free.append(arrival)
            self._compare(arrival.index, arrival.numbers.tolist())

    def _compare(self, index: int, sent: list[int]) -> None:
        for process, other in enumerate(sent):
            if other != index:
                units = [self._names[i] if 0 <= i < len(self._names) else "another tensor" for i in (index, other)]
                raise UnsupportedError(
                    f"this process gathered {units[0]} and process {process} of the mesh {units[1]} at the same time, "
                    "so outputs and gradients from there on are wrong; all processes have to run the same modules in "
                    "the same order: turn off what skips layers by chance (layerdrop, stochastic depth), or draw it "
                    "alike in all processes, and begin again from the last checkpoint"
                )


class _Arrival:
    """Pinned memory for the tags of one gather, and the event after which they are there."""

    index: int

    def __init__(self, pinned: Tensor) -> None:
        self.tags, self.numbers = pinned, _numbers(pinned)
        self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def is_there(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def bring(self, index: int, tags: Tensor) -> None:
        self.index = index
        self.tags.copy_(tags, non_blocking=True)
        self.event.record(torch.cuda.current_stream(tags.device))


def _numbers(tags: Tensor) -> Tensor:
    return tags.view(torch.int64)[:, 0]
