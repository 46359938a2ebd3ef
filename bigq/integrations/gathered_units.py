"""Gathered units: modules whose weights are cut by rows among processes, and are whole while they run.

The rows of a unit stand in one piece of memory, so that one gather and one copy make its weights whole. The next unit
is gathered while one runs. Whole weights lie at the same place in each step, and what autograd has saved is right again
once they are gathered again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from math import prod
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from bigq.errors import UnsupportedError
from bigq.ops.sharding import chunk_of_rank, is_sharded
from bigq.system.internals import SEES_EDITS, version_of
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["CutWeight", "GatheredUnits", "Place"]

_ALIGNMENT = 256  # bytes at which each weight begins
Place = tuple[nn.Module, str]


@dataclass(frozen=True)
class CutWeight:
    """A tensor of some modules, of which each process of `mesh` has some rows.

    Args:
        places: all modules and names where it stands.
        shape: of the whole.
        dtype: of the whole.
        mesh: of one dimension.
    """

    places: tuple[Place, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    mesh: DeviceMesh

    @classmethod
    def of(cls, places: Sequence[Place], mesh: DeviceMesh) -> "CutWeight":
        """Leave the rows of this process in `places`, where the whole tensor, or a DTensor of rows, stands."""
        own = _held(places[0])
        cut = cls(tuple(places), tuple(own.shape), own.dtype, mesh)
        if not is_sharded(own):
            start, stop = chunk_of_rank(len(own), mesh.get_local_rank(), mesh.size())
            cut.put(cut.shard_of(own.data[start:stop].clone()))
        return cut

    @property
    def held(self) -> nn.Parameter:
        """What stands in the modules now."""
        return _held(self.places[0])

    @property
    def chunk(self) -> int:
        """Bytes that each process sends. The last ones may have fewer rows, and send a filling."""
        return -(-self.shape[0] // self.mesh.size()) * prod(self.shape[1:]) * self.dtype.itemsize

    def put(self, tensor: nn.Parameter) -> None:
        """Let `tensor` stand in the modules."""
        for module, name in self.places:
            module._parameters[name] = tensor

    def shard_of(self, rows: Tensor) -> nn.Parameter:
        """The tensor whose `rows` this process has."""
        shape = torch.Size(self.shape)
        stride = torch.empty(shape, device="meta").stride()
        placed = DTensor.from_local(rows, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        return nn.Parameter(placed, requires_grad=False)


class _Memory:
    """Memory in which units with weights of the same `sizes` in bytes are whole in turn."""

    def __init__(self, sizes: tuple[int, ...], device: torch.device) -> None:
        self.sizes = sizes
        self.bytes = torch.empty(sum(map(_aligned, sizes)), dtype=torch.uint8, device=device)
        self.owner: _Packed | None = None


class _Packed:
    """The rows that this process has of the weights of a unit in one piece of memory, and its whole weights.

    Args:
        weights: of the unit. Their shards become views of that memory.
        memory: where they are whole.
    """

    def __init__(self, weights: Sequence[CutWeight], memory: _Memory) -> None:
        self.weights, self.memory = weights, memory
        device, processes = memory.bytes.device, weights[0].mesh.size()
        self.rows = torch.zeros(sum(map(_aligned, _chunks(weights))), dtype=torch.uint8, device=device)
        self.shards: list[nn.Parameter] = []
        self.whole: list[nn.Parameter] = []
        self.versions: list[int] = []  # of whole weights that nobody has written to
        self.sizes: list[int] = []  # of the rows, and of what fills them up, as they are copied
        self.parts: list[Tensor] = []  # where that goes
        self.is_whole = False
        # Attributes of modules, which nn.Module's own lookup finds ten times slower, for all weights of a block.
        self._places = [(vars(module), name, i) for i, own in enumerate(weights) for module, name in own.places]
        modules = dict.fromkeys(module for weight in weights for module, _ in weight.places)
        self._guarded = [vars(module) for module in modules if isinstance(module, QuantizedModule)]
        self.arrived = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        from_start = in_memory = 0
        for weight in weights:
            own = cast(DTensor, weight.held).to_local().detach()
            nbytes, filling = own.numel() * own.itemsize, _aligned(weight.chunk) - weight.chunk
            rows = self.rows[from_start : from_start + nbytes].view(weight.dtype).view(own.shape).copy_(own)
            self.shards.append(weight.shard_of(rows))
            weight.put(self.shards[-1])
            piece = memory.bytes[in_memory : in_memory + processes * weight.chunk]
            self.sizes.append(weight.chunk)
            self.parts.append(piece.view(processes, -1))
            if filling:
                self.sizes.append(filling)
                self.parts.append(torch.empty(processes, filling, dtype=torch.uint8, device=device))
            numbers = piece.view(weight.dtype)[: prod(weight.shape)].view(weight.shape)
            # `.data`: it gets other numbers without a new version, so that autograd takes what it saved as unchanged.
            self.whole.append(nn.Parameter(numbers.data, requires_grad=False))
            self.versions.append(version_of(self.whole[-1]))
            from_start += _aligned(weight.chunk)
            in_memory += _aligned(processes * weight.chunk)

    @property
    def comes_in_place(self) -> bool:
        """Whether the rows of all processes, one after the other, are the whole weight, as of an embedding."""
        return len(self.sizes) == 1

    @property
    def is_current(self) -> bool:
        """Whether the modules hold these tensors, and no others that were assigned since."""
        own = self.whole if self.is_whole else self.shards
        return all(attributes["_parameters"][name] is own[i] for attributes, name, i in self._places)

    def put(self, *, is_gathered: bool, is_whole: bool) -> None:
        """Let the whole weights, or the shards, stand where either stands now. Writes to gathered ones are refused."""
        before = self.whole if self.is_whole else self.shards
        after = self.whole if is_whole else self.shards
        self.is_whole = is_whole
        for attributes, name, i in self._places:
            parameters = attributes["_parameters"]
            if parameters[name] is before[i]:  # and no tensor that was assigned since
                parameters[name] = after[i]
        for attributes in self._guarded:
            attributes["_is_gathered"] = is_gathered

    def drop(self) -> None:
        """Let the shards stand in the modules, which may be written to then, and forget what was gathered."""
        if self.memory.owner is self:
            self.memory.owner = None
            self.put(is_gathered=False, is_whole=False)
            self._refuse_lost_write()

    def _refuse_lost_write(self) -> None:
        if not SEES_EDITS:
            return
        written = [i for i, own in enumerate(self.whole) if version_of(own) != self.versions[i]]
        for i in written:
            self.whole[i] = nn.Parameter(self.whole[i].data, requires_grad=False)
            self.versions[i] = version_of(self.whole[i])
        if written:
            module, name = self.weights[written[0]].places[0]
            raise UnsupportedError(
                f"{name} of {type(module).__name__} was written to while it was gathered for a call, and the write is "
                "lost: call reshard_frozen(model) before the write, and repeat it"
            )


class GatheredUnits:
    """The units of a model in the order in which they run, forward and then backward.

    In another order they are gathered when they are needed, and nothing ahead of that.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self._group, self._processes = mesh.get_group(), mesh.size()
        self._units: list[list[CutWeight]] = []
        self._packed: dict[int, _Packed] = {}
        self._memories: list[_Memory] = []
        self._received: dict[int, Tensor] = {}  # what a gather receives, by its bytes, before it is copied to its place
        self._in_backward: set[int] = set()  # units whose weights a backward pass needs: not those of embeddings
        self._current, self._step = 0, 1
        self._stream: torch.cuda.Stream | None = None
        self._queued: torch.cuda.Event | None = None

    def add(self, modules: Sequence[nn.Module], weights: Sequence[CutWeight]) -> None:
        """Make the next unit of `weights`, which are whole while one of `modules` runs, forward and backward."""
        index = len(self._units)
        self._units.append(list(weights))

        def before(module: nn.Module, args: object) -> None:
            self._enter(index)

        def backward(grad: Tensor) -> None:
            if torch.is_grad_enabled():
                raise UnsupportedError(
                    "a gradient of a gradient (create_graph=True) was asked for of a model in frozen shards, whose "
                    "weights are not gathered for that: use DDP without shard_frozen"
                )
            self._enter(index)

        def after(module: nn.Module, args: object, out: object) -> None:
            if torch.is_grad_enabled():
                tensors = list(_tensors(out))
                if not tensors:
                    raise UnsupportedError(
                        f"{type(module).__name__} returns {type(out).__name__} without a tensor in it, so its weights "
                        "would not be gathered for a backward pass; expected a tensor, or a tuple, list, mapping or "
                        "dataclass that holds one. Without a backward pass, call it under torch.no_grad()"
                    )
                for tensor in tensors:
                    if tensor.requires_grad:
                        tensor.register_hook(backward)  # type: ignore[no-untyped-call]

        for module in modules:
            module.register_forward_pre_hook(before, prepend=True)
            if not isinstance(module, nn.Embedding):
                module.register_forward_hook(after)
                self._in_backward.add(index)

    def put_back(self) -> None:
        """Let shards stand in all modules."""
        for packed in self._packed.values():
            packed.drop()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.inference_mode(False)  # what is made in inference mode cannot be gathered, or saved for gradients, later
    def _enter(self, index: int) -> None:
        """Make a unit whole for the work that is queued from now on, and begin to gather the one that comes next."""
        if index != self._current:
            self._step = 1 if index > self._current or index == 0 else -1
            self._current = index
        packed = self._gather(index)
        if not packed.is_whole:
            if packed.arrived is not None:
                torch.cuda.current_stream(packed.rows.device).wait_event(packed.arrived)
            packed.put(is_gathered=True, is_whole=True)
        follower = index + self._step
        if follower in self._in_backward or (self._step > 0 and follower < len(self._units)):
            self._gather(follower)

    def _gather(self, index: int) -> _Packed:
        """Queue the gather of a unit after the work that is queued, which may need what it overwrites."""
        packed = self._packed.get(index)
        if packed is None or not packed.is_current:
            packed = self._pack(index)
        memory = packed.memory
        if memory.owner is packed:
            return packed
        if memory.owner is not None:
            memory.owner.drop()
        if self._stream is None or self._queued is None or packed.arrived is None:
            self._receive(packed)
        else:
            self._queued.record(torch.cuda.current_stream(packed.rows.device))
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(self._queued)
                self._receive(packed)
                packed.arrived.record(self._stream)
        memory.owner = packed
        packed.put(is_gathered=True, is_whole=False)
        return packed

    def _receive(self, packed: _Packed) -> None:
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
        if packed.comes_in_place:
            gather(packed.memory.bytes, packed.rows, group=self._group)
            return
        received = self._received[packed.rows.numel()]
        gather(received, packed.rows, group=self._group)
        torch.split_with_sizes_copy(received.view(self._processes, -1), packed.sizes, dim=1, out=packed.parts)

    def _pack(self, index: int) -> _Packed:
        """Pack what stands in the modules of a unit, also where a whole tensor was assigned to them since."""
        weights = [own if is_sharded(own.held) else CutWeight.of(own.places, own.mesh) for own in self._units[index]]
        before = self._packed.pop(index, None)
        if before is not None and before.memory.owner is before:
            before.memory.owner = None
        self._units[index] = weights
        device = cast(DTensor, weights[0].held).to_local().device
        packed = self._packed[index] = _Packed(weights, self._memory_for(index, device))
        nbytes = packed.rows.numel()
        if not packed.comes_in_place and nbytes not in self._received:
            self._received[nbytes] = torch.empty(self._processes * nbytes, dtype=torch.uint8, device=device)
        if device.type == "cuda" and self._stream is None:
            self._stream, self._queued = torch.cuda.Stream(device), torch.cuda.Event()  # type: ignore[no-untyped-call]
        return packed

    def _memory_for(self, index: int, device: torch.device) -> _Memory:
        """Memory that fits a unit, and that the one before it and the one after it do not use."""
        sizes = tuple(self._processes * chunk for chunk in _chunks(self._units[index]))
        near = [self._packed[other].memory for other in (index - 1, index + 1) if other in self._packed]
        for memory in self._memories:
            if memory.sizes == sizes and memory not in near:
                return memory
        self._memories.append(_Memory(sizes, device))
        return self._memories[-1]


def _held(place: Place) -> nn.Parameter:
    module, name = place
    return cast(nn.Parameter, module._parameters[name])


def _chunks(weights: Sequence[CutWeight]) -> list[int]:
    return [weight.chunk for weight in weights]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in what a module returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
    elif is_dataclass(value):
        yield from _tensors(vars(value))
