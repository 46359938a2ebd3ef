"""Store: brings each tensor of a plan to where it rests."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.device_map import DeviceMap, execution_device, is_offloaded
from bigq.errors import PlacementError
from bigq.formats import TensorSpec
from bigq.offload import OffloadFile
from bigq.placement import resting_places
from bigq.plan import Plan

__all__ = ["Store"]


@dataclass(kw_only=True)
class Store:
    """Where each tensor rests, by its first name; the disk space of those that rest there is reserved."""

    resting: Mapping[str, tuple[str, TensorSpec]]
    runs_on: torch.device
    file: OffloadFile | None

    @classmethod
    def open(cls, plan: Plan, device_map: DeviceMap, offload_folder: str | os.PathLike[str] | None) -> "Store":
        """Raises PlacementError where the map asks for the disk and there is no folder or no room."""
        resting = resting_places(plan, device_map)
        on_disk = [spec for place, spec in resting.values() if place == "disk"]
        file = None
        if on_disk:
            if offload_folder is None:
                raise PlacementError("device_map sends modules to 'disk': pass offload_folder, where they are kept")
            file = OffloadFile(offload_folder, on_disk)
        return cls(resting=resting, runs_on=execution_device(device_map), file=file)

    def is_offloaded(self, name: str) -> bool:
        """Whether the tensor called `name` rests elsewhere than where it runs."""
        place, _ = self.resting.get(name, (None, None))
        return is_offloaded(place, self.runs_on)

    def work_device(self, name: str, *, quantize: bool) -> torch.device:
        """Where the tensor called `name` is worked on: where it rests, or, to `quantize` it, where it will run."""
        place, _ = self.resting[name]
        if place in ("cpu", "disk"):
            return self.runs_on if quantize else torch.device("cpu")
        return torch.device(place)

    def put(self, name: str, tensor: Tensor, *, owned: bool) -> Tensor:
        """`tensor` at its resting place, in its final dtype, with a storage of its own.

        `owned` says that its memory may be kept: it is neither a view of a file nor of another tensor.
        """
        place, spec = self.resting[name]
        if place not in ("cpu", "disk"):
            tensor = tensor.to(place)
        cast = tensor.to(spec.dtype)
        owned = owned or cast is not tensor
        if place == "disk":
            assert self.file is not None
            return self.file.empty(spec).copy_(cast)
        final = cast.to(place)
        return final if owned or final is not cast else final.clone()
