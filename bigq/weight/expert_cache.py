"""ExpertCache: the experts of a layer that were hit last, in the memory of a GPU, while host memory holds all of them.

Routers choose some experts again and again. A call copies from host memory what is not here, in the place of what was
not used for longest, and multiplies as with a stack of as many experts as there are slots. Which experts are here is
known on the GPU alone: the host waits for nothing, and CUDA graphs hold such calls.

A wrong number is worse than a slow call, so the host knows three things. The tensors that the slots were filled from
are those that the module holds: else the slots are emptied, or the call does without them. All copies of the last call
were queued: after an interrupt in between, the slots say that they hold nothing. One call at a time uses the slots.
"""

from collections.abc import Callable, Collection, Mapping
from math import prod
from threading import Lock
from weakref import ref

import torch
from torch import Tensor

from bigq.errors import UnsupportedError
from bigq.formats import TensorSpec
from bigq.ops import eager
from bigq.system.internals import functorch_transforms
from bigq.system.interrupts import to_the_end

__all__ = ["ExpertCache", "ExpertUse"]

_ALIGNMENT = 256  # bytes; kernels read 16 at a time
_WORDS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}  # what copies move, by bytes


class ExpertUse:
    """The use of a cache by one call, from `ExpertCache.fetch` until `end`, or until nothing refers to it.

    Args:
        tensors: {name: tensor} of the experts in the slots.
    """

    slots: Tensor  # int32 [R]: the slot of each row's expert

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.is_open = True

    def end(self) -> None:
        """The products of the call are queued."""
        self.is_open = False


class ExpertCache:
    """Slots on `device` for some experts of a layer.

    A deepcopy of one, and a pickled one, is None: the copy of a model has no cache.

    Args:
        specs: {name of the Parameter: what it is for as many experts as there are slots}.
        shared: the names of those that all experts share.
        experts: how many the layer has.
        slots: how many are here at a time.
        device: that multiplies.
    """

    def __init__(
        self,
        specs: Mapping[str, TensorSpec],
        shared: Collection[str],
        *,
        experts: int,
        slots: int,
        device: torch.device,
    ) -> None:
        self.experts, self.slots = experts, slots
        self.device, self._shared = device, frozenset(shared)
        with torch.inference_mode(False), torch.no_grad():
            self._buffer = torch.empty(self.nbytes_of(specs, slots), dtype=torch.uint8, device=device)
            self._held, self._stamps, *tensors = _carved(self._buffer, [*_state_specs(slots), *specs.values()])
            self.tensors = dict(zip(specs, tensors, strict=True))
            self._pools = [_rows(tensor, slots) for name, tensor in self.tensors.items() if name not in self._shared]
            self._held.fill_(-1)
            self._stamps.fill_(0)
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._views: Mapping[str, Tensor] | None = None  # what the module holds in calls that read host memory
        self._filled_from: Mapping[str, Tensor] | None = None
        self._sources: list[Tensor] = []
        self._is_whole = True  # the slots hold what they say
        self._lock = Lock()
        self._use: Callable[[], ExpertUse | None] = lambda: None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    @staticmethod
    def nbytes_of(specs: Mapping[str, TensorSpec], slots: int) -> int:
        """Bytes on the device of a cache of `slots` slots, whose tensors are `specs`."""
        return sum(_aligned(spec.nbytes) for spec in (*_state_specs(slots), *specs.values()))

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._buffer.nbytes

    def read_from(self, views: Mapping[str, Tensor] | None) -> None:
        """Note the tensors over host memory that a module holds in its next calls; None: they are not read in place.

        What is in the slots came from other tensors, or from these before they were edited.
        """
        self._views = views

    def empty(self) -> None:
        """Forget what the slots hold, and copy what all experts share. A call does it where it is needed."""
        if self._views is not None:
            self._empty(self._views)

    def _empty(self, views: Mapping[str, Tensor]) -> None:
        if self._is_captured():
            raise UnsupportedError(
                "a CUDA graph is captured, and the cache of these experts holds what they were before they were "
                "edited: call the model once, or bigq.cache_experts again, before the capture"
            )
        self._is_whole, self._filled_from = False, None
        with torch.inference_mode(False), torch.no_grad():
            self._sources = [_rows(view, self.experts) for name, view in views.items() if name not in self._shared]
            self._held.fill_(-1)
            for name in self._shared:  # a kernel reads host memory by its address; a copy would ask whose it is
                torch.add(views[name], 0, out=self.tensors[name])
        self._filled_from = views
        self._is_whole = True

    def fetch(self, held: Mapping[str, Tensor | None], ids: Tensor) -> ExpertUse | None:
        """Copy the experts that ids [R] hit and that are not here; None where the call has to do without the cache.

        That is where the module does not hold the views, gradients are computed, torch.func transforms the call, there
        are more rows than slots, or another call uses the slots, such as one of another thread.

        Args:
            held: the Parameters of the module.
            ids: int32 or int64, on the device.

        Raises:
            UnsupportedError: experts were edited since the last call, and a CUDA graph is captured.
        """
        views = self._views
        if views is None or torch.is_grad_enabled() or not 0 < len(ids) <= self.slots or functorch_transforms():
            return None
        if not all(held.get(name) is view for name, view in views.items()):
            return None
        with self._lock:
            last = self._use()
            if last is not None and last.is_open:
                return None
            use = ExpertUse(self.tensors)
            self._use = ref(use)
        try:
            self._follow_other_streams()
            if not self._is_whole or views is not self._filled_from:
                self._empty(views)
            self._is_whole = False
            use.slots, copies = eager.call_op("assign_slots", ids, self._held, self._stamps, self.experts)
            eager.call_op("fill_slots", copies, self._sources, self._pools)
            self._is_whole = True
        except BaseException:
            use.end()  # a traceback may keep it
            to_the_end(self._distrust)
            raise
        return use

    def _distrust(self) -> None:
        """After a call that failed: a CUDA graph that is replayed next reads what the slots say, and nothing else."""
        if not (self._is_whole or self._is_captured()):  # what is captured has noted nothing
            self._held.fill_(-1)

    def _is_captured(self) -> bool:
        return self._stream is not None and torch.cuda.is_current_stream_capturing()

    def _follow_other_streams(self) -> None:
        """Let the current stream wait for the one that used the slots last. A graph is ordered by who replays it."""
        if self._stream is None or self._is_captured():
            return
        stream = torch.cuda.current_stream(self.device)
        if stream != self._stream:
            stream.wait_stream(self._stream)
            self._buffer.record_stream(stream)
            self._stream = stream


def _state_specs(slots: int) -> tuple[TensorSpec, TensorSpec]:
    """Which expert a slot holds, and which call used it last: what `assign_slots` takes."""
    return TensorSpec(shape=(slots,), dtype=torch.int32), TensorSpec(shape=(slots,), dtype=torch.int64)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _carved(buffer: Tensor, specs: Collection[TensorSpec]) -> list[Tensor]:
    """A tensor of each of `specs` in `buffer`, one behind the other."""
    made, start = [], 0
    for spec in specs:
        made.append(buffer[start : start + spec.nbytes].view(spec.dtype).view(spec.shape))
        start += _aligned(spec.nbytes)
    return made


def _rows(tensor: Tensor, count: int) -> Tensor:
    """The memory of a contiguous tensor as `count` rows of the largest words that fit, one for each expert."""
    nbytes = prod(tensor.shape) * tensor.itemsize // count
    size = next(size for size in _WORDS if nbytes % size == 0)
    return tensor.detach().view(-1).view(_WORDS[size]).view(count, nbytes // size)
