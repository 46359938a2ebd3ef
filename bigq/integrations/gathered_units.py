"""Gathered units: modules whose weights are cut by rows among processes, and are whole while they run.

One collective gathers all weights of a unit to where they are whole. The next unit is gathered while one runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import is_dataclass, replace
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from bigq.errors import UnsupportedError
from bigq.integrations.packed_units import CutWeight, Memory, Packed
from bigq.integrations.unit_tags import Tags
from bigq.interop.frozen_weights import innermost, note_unit
from bigq.ops.sharding import is_sharded
from bigq.system.distributed.internals import coalesced_gather
from bigq.system.internals import SEES_EDITS

__all__ = ["GatheredUnits"]

_MET = "bigq.integrations.gathered_units"  # a key in the metadata of a node of autograd


class GatheredUnits:
    """The units of a model in the order in which they run, forward and then backward.

    In another order they are gathered when they are needed, and nothing ahead of that. All processes have to gather the
    same units in the same order: see `Tags`.

    Args:
        root: the model. A deepcopy of it has gathered units of its own, which its processes gather for it.
        mesh: of one dimension.
    """

    def __init__(self, root: nn.Module, mesh: DeviceMesh) -> None:
        self._root, self._mesh, self._processes = root, mesh, mesh.size()
        self._gather_each = coalesced_gather(mesh.get_group(), mesh.device_type)
        self._units: list[list[CutWeight]] = []
        self._names: list[str] = []
        self._in_backward: set[int] = set()  # units whose weights a backward pass needs: not those of embeddings
        self._packed: dict[int, Packed] = {}
        self._memories: list[Memory] = []
        self._tags = Tags(self._names)
        self._current, self._step = 0, 1
        self._stream: torch.cuda.Stream | None = None
        self._queued: torch.cuda.Event | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "GatheredUnits":
        root = memo.get(id(self._root))
        if root is None:
            raise UnsupportedError(
                f"a part of {type(self._root).__name__} was to be copied, whose weights are gathered for the calls of "
                "the whole model: copy the model that shard_frozen was called with, in all processes"
            )
        own = memo[id(self)] = GatheredUnits(root, self._mesh)
        own._names += self._names
        own._in_backward |= self._in_backward
        for unit in self._units:
            places = [tuple((deepcopy(module, memo), name) for module, name in weight.places) for weight in unit]
            own._append([replace(weight, places=copies) for weight, copies in zip(unit, places, strict=True)])
        return own

    def __getstate__(self) -> NoReturn:
        raise UnsupportedError(
            f"{type(self._root).__name__} is in frozen shards and was to be pickled, which groups of processes cannot "
            "be: call bigq.save_quantized(model, folder) in all processes, and save the adapter by its own method"
        )

    def add(self, name: str, modules: Sequence[nn.Module], weights: Sequence[CutWeight]) -> None:
        """Make the next unit of `weights`, which are whole while one of `modules` runs, forward and backward."""
        index = self._append(weights)
        self._names.append(name)
        for module in modules:  # no closures, so that a deepcopy of the model calls its own units
            module.register_forward_pre_hook(partial(self._before, index), prepend=True, with_kwargs=True)
            if not isinstance(innermost(module), nn.Embedding):
                module.register_forward_hook(partial(self._after, index))
                self._in_backward.add(index)

    def _append(self, weights: Sequence[CutWeight]) -> int:
        """Make `weights` those of the next unit, and let merges find it: its index."""
        index = len(self._units)
        self._units.append(list(weights))
        for module in dict.fromkeys(module for weight in weights for module, _ in weight.places):
            note_unit(module, self, index)
        return index

    def put_back(self) -> None:
        """Let shards stand in all modules."""
        for index in range(len(self._units)):
            self.put_back_unit(index)
        self._tags.check(wait=True)

    def put_back_unit(self, index: int) -> None:
        """Let shards stand in the modules of a unit. A deepcopy may have whole weights that were never gathered."""
        if index in self._packed:
            self._packed[index].drop()
        else:
            self._cut(index)

    def _before(self, index: int, module: nn.Module, args: object, kwargs: object) -> None:
        if torch.is_grad_enabled():
            _new((args, kwargs))  # what goes through unchanged is no output of this module
        self._enter(index)

    def _after(self, index: int, module: nn.Module, args: object, out: object) -> None:
        if torch.is_grad_enabled():
            tensors = list(_tensors(out))
            if not tensors:
                raise UnsupportedError(
                    f"{type(module).__name__} returns {type(out).__name__} without a tensor in it, so its weights "
                    "would not be gathered for a backward pass; expected a tensor, or a tuple, list, mapping or "
                    "dataclass that holds one. Without a backward pass, call it under torch.no_grad()"
                )
            new = _new(tensors)
            if new:
                packed = self._packed[index]
                backward = partial(self._backward, index, packed, packed.edits)
                for tensor in new:
                    tensor.register_hook(backward)

    def _backward(self, index: int, packed: Packed, edits: list[int], grad: Tensor) -> None:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "a gradient of a gradient (create_graph=True) was asked for of a model in frozen shards, whose "
                "weights are not gathered for that: use DDP without shard_frozen"
            )
        self._enter(index)
        if SEES_EDITS and (self._packed[index] is not packed or packed.edits != edits):
            raise UnsupportedError(
                f"weights of {self._names[index]} were written to after the forward pass, and its backward pass would "
                "compute with the new ones: write to weights, or merge an adapter, after the backward pass"
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.inference_mode(False)  # what is made in inference mode cannot be gathered, or saved for gradients, later
    def _enter(self, index: int) -> None:
        """Make a unit whole for the work that is queued from now on, and begin to gather the one that comes next."""
        self._tags.check()
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

    def _gather(self, index: int) -> Packed:
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

    def _receive(self, packed: Packed) -> None:
        self._gather_each(packed.received, packed.sent)
        self._tags.arrive(packed.index, packed.tags)

    def _cut(self, index: int) -> list[CutWeight]:
        """The weights of a unit, in whose modules shards stand from now on, also where a whole tensor was assigned."""
        weights = [
            own if is_sharded(own.held) else CutWeight.of(own.places, self._mesh, {}) for own in self._units[index]
        ]
        for weight in weights:
            weight.allow_writes()
        self._units[index] = weights
        return weights

    def _pack(self, index: int) -> Packed:
        """Pack what stands in the modules of a unit."""
        weights = self._cut(index)
        device = cast(DTensor, weights[0].held).to_local().device
        before = self._packed.pop(index, None)
        if before is not None:
            if before.arrived is not None:  # a gather may still read its rows, whose memory is given out next
                torch.cuda.current_stream(device).wait_event(before.arrived)
            if before.memory.owner is before:
                before.memory.owner = None
        packed = self._packed[index] = Packed(index, weights, self._memory_for(index, device))
        if device.type == "cuda" and self._stream is None:
            self._stream, self._queued = torch.cuda.Stream(device), torch.cuda.Event()  # type: ignore[no-untyped-call]
        return packed

    def _memory_for(self, index: int, device: torch.device) -> Memory:
        """Memory that fits a unit, and that the one before it and the one after it do not use."""
        sizes = tuple(self._processes * weight.chunk for weight in self._units[index])
        near = [self._packed[other].memory for other in (index - 1, index + 1) if other in self._packed]
        for memory in self._memories:
            if memory.sizes == sizes and memory not in near:
                return memory
        self._memories.append(Memory(sizes, device))
        return self._memories[-1]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _new(value: object) -> list[Tensor]:
    """The tensors in `value` that autograd has made and that are met for the first time.

    A block that is left out returns what the one before it has made. Its weights would take the place of those of that
    one, just before the backward pass needs them. The node of autograd notes that a tensor was met: an operation in
    place gives a tensor another node.
    """
    found = []
    for tensor in _tensors(value):
        node = tensor.grad_fn if tensor.requires_grad else None
        if node is not None:
            known: dict[object, object] = node.metadata  # type: ignore[assignment]
            key = _MET, tensor.output_nr
            if key not in known:
                known[key] = True
                found.append(tensor)
    return found


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in what a module takes or returns."""
    if isinstance(value, Tensor):
        yield value
    elif value is None or isinstance(value, (int, str)):  # most arguments: to ask for a Mapping takes longer
        return
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(vars(value))
