"""Destinations: where each tensor of a plan is to be stored, and the memory for it."""

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bigq.checkpoint import Rows, Source
from bigq.formats import TensorSpec
from bigq.offload.space import CheckpointMap, OffloadSpace
from bigq.planning.device_map import DeviceMap, execution_device, is_gpu, is_offloaded
from bigq.planning.plan import Plan, PlannedTensor, PlannedWeight
from bigq.planning.storage_places import storage_places

__all__ = ["Destinations"]


def _as_it_is(name: str, tensor: Tensor) -> Tensor:
    return tensor


@dataclass(kw_only=True)
class Destinations:
    """The place of each tensor and each quantized weight, by its first name: see `storage_places`.

    `spaces` holds the memory that is reserved on "cpu" and "disk". `in_checkpoint` holds the tensors on "disk" that the
    checkpoint has just as the model needs them: they stay in its file, and no second copy is made. `cuts` holds the
    rows that are kept of a part of a quantized weight that is made whole. `moved` is called with each tensor that is
    finished, and its first name, and returns its numbers where they stay: some shards leave their device then.
    """

    places: Mapping[str, str]
    runs_on: torch.device
    spaces: Mapping[str, OffloadSpace]
    in_checkpoint: Mapping[str, Tensor]
    cuts: Mapping[str, Rows] = field(default_factory=dict)
    moved: Callable[[str, Tensor], Tensor] = _as_it_is
    _received: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        plan: Plan,
        device_map: DeviceMap,
        offload_folder: str | os.PathLike[str] | None,
        source: Source,
        *,
        cuts: Mapping[str, Rows] | None = None,
        moved: Callable[[str, Tensor], Tensor] = _as_it_is,
    ) -> "Destinations":
        """Reserve the memory. Raises PlacementError if "disk" is asked for without a folder, or there is too little."""
        places, runs_on = storage_places(plan, device_map), execution_device(device_map)
        in_checkpoint = _stored_in_checkpoint(plan, places, source)
        offloaded: dict[str, dict[str, TensorSpec]] = {
            place: {} for place in ("disk", "cpu") if is_offloaded(place, runs_on)
        }
        for tensor in plan.tensors:
            name = tensor.names[0]
            if places[name] in offloaded and name not in in_checkpoint:
                offloaded[places[name]][name] = tensor.spec
        for weight in plan.weights:
            place = places.get(weight.names[0])
            if place in offloaded:
                offloaded[place] |= {names[0]: spec for names, spec in weight.specs().items()}
        spaces = {}
        if offloaded.get("disk"):
            spaces["disk"] = OffloadSpace.in_file(offload_folder or tempfile.gettempdir(), offloaded["disk"])
        if offloaded.get("cpu"):
            spaces["cpu"] = OffloadSpace.pinned(offloaded["cpu"])
        return cls(
            places=places,
            runs_on=runs_on,
            spaces=spaces,
            in_checkpoint=in_checkpoint,
            cuts=cuts or {},
            moved=moved,
        )

    def is_offloaded(self, name: str) -> bool:
        """Whether the tensor called `name` is stored elsewhere than where it runs."""
        return is_offloaded(self.places.get(name), self.runs_on)

    def work_device(self, name: str, *, runs: bool = False) -> torch.device:
        """Where the tensor called `name` is worked on: where it is stored, or where it will run."""
        place = self.places[name]
        if is_gpu(place):
            return _device(place)
        return self.runs_on if runs else torch.device("cpu")

    def receive(self, job: PlannedTensor, dtype: torch.dtype) -> Tensor:
        """Memory to read a tensor of `dtype` into: its own, if that is the dtype it stays in; `put` then keeps it."""
        name, spec = job.names[0], job.spec
        place = self.places[name]
        if dtype == spec.dtype and place in self.spaces:
            self._received[name] = self.spaces[place].empty(name)
            return self._received[name]
        return torch.empty(spec.shape, dtype=dtype, device=self.work_device(name))

    def put(self, job: PlannedTensor, tensor: Tensor) -> Tensor:
        """`tensor` where it is stored, in its final dtype; it may be the same object, so it has to own its storage."""
        name, dtype = job.names[0], job.spec.dtype
        place = self.places[name]
        if self._received.pop(name, None) is tensor:
            return tensor
        if place in self.spaces:
            return self.spaces[place].empty(name).copy_(tensor)
        if tensor.dtype == dtype and tensor.device == _device(place):
            return tensor
        return tensor.to(place).to(dtype)  # cast at the end of the link: it is shorter there

    def put_state(self, weight: PlannedWeight, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a quantized weight, by name, where they are stored; they may be the same objects."""
        place = self.places[weight.names[0]]
        if self.cuts:
            cut = {name: self.cuts[name].of(tensor).clone() for name, tensor in tensors.items() if name in self.cuts}
            tensors = {**tensors, **cut}
        if place not in self.spaces:
            return {name: self.moved(name, tensor) for name, tensor in tensors.items()}  # most are where they stay
        space = self.spaces[place]
        return {name: space.empty(name).copy_(tensor) for name, tensor in tensors.items()}


@cache  # torch takes half a microsecond to read it, and a model may have 19,000 linears
def _device(place: str) -> torch.device:
    return torch.device(place)


def _stored_in_checkpoint(plan: Plan, places: Mapping[str, str], source: Source) -> dict[str, Tensor]:
    """{first name: tensor} of what goes to "disk" unchanged, and lies in one piece in a local file."""
    tensors: dict[str, Tensor] = {}
    files: dict[Path, CheckpointMap] = {}
    for planned in plan.tensors:
        name, spec = planned.names[0], planned.spec
        if places[name] != "disk" or planned.source is None:
            continue
        info = source.tensors[planned.source]
        unchanged = info.coding is None and spec == TensorSpec(shape=tuple(info.shape), dtype=info.dtype)
        if len(info.spans) != 1 or not unchanged:
            continue
        file, offset, _ = info.spans[0]
        if file.path is None or offset % spec.dtype.itemsize:
            continue
        if file.path not in files:
            files[file.path] = CheckpointMap.open(file.path, file.nbytes, file.identity)
        tensors[name] = files[file.path].tensor(offset, spec)
    return tensors
