"""OffloadedShards: the shards that FSDP2 keeps on the CPU, in pinned or ordinary memory or in a file."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bigq.errors import ConfigError
from bigq.formats import TensorSpec
from bigq.offload.space import OffloadSpace
from bigq.ops.sharding import local_part
from bigq.system.distributed.internals import CpuShard, cpu_shards

__all__ = ["OffloadedShards"]


class OffloadedShards:
    """The shards of modules that were sharded with a CPUOffloadPolicy. Each goes to its place once it is finished.

    With an `offload_folder`, what is frozen and not to be pinned goes to an unnamed file in it. The file is mapped, and
    FSDP2 copies from the map for each gather. What is trained stays in memory, because an optimizer writes to it.

    Args:
        model: that was sharded, on meta.
        tensors: those of it that get numbers, by first name.
        offload_folder: None for no file.

    Raises:
        ConfigError: there is an `offload_folder`, and nothing that would go to a file in it.
        PlacementError: the file cannot be written, or the disk is full.
    """

    def __init__(
        self, model: nn.Module, tensors: Mapping[str, Tensor], offload_folder: str | os.PathLike[str] | None
    ) -> None:
        kept = {key: shard for module in model.modules() for key, shard in cpu_shards(module).items()}
        self._shards = {name: kept[id(tensor)] for name, tensor in tensors.items() if id(tensor) in kept}
        with torch.no_grad():  # in which torch hands out what a DTensor holds without a node of autograd
            self._specs = {name: _spec_of(local_part(tensors[name])) for name in self._shards}
        self._moved: dict[str, Tensor] = {}
        self._in_file: dict[str, TensorSpec] = {}  # with the rows that FSDP2 adds
        if offload_folder is not None:
            self._in_file = {
                name: TensorSpec(shape=(shard.rows, *self._specs[name].shape[1:]), dtype=self._specs[name].dtype)
                for name, shard in self._shards.items()
                if not (shard.is_pinned or tensors[name].requires_grad)
            }
            _refuse_unused(offload_folder, self._shards, self._in_file)
            self._space = OffloadSpace.in_file(offload_folder, self._in_file)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._shards)

    def place(self, name: str) -> str | None:
        """The place of the tensor called `name`: "cpu" or "disk"; None if it is on the device."""
        return "disk" if name in self._in_file else "cpu" if name in self._shards else None

    def moved(self, name: str, tensor: Tensor) -> Tensor:
        """The numbers of `tensor` where they stay, if it is all that this process keeps of `name`; else as it is.

        What has been moved already stays the object that it is.
        """
        spec = self._specs.get(name)
        if spec is None or spec != _spec_of(tensor) or self._moved.get(name) is tensor:
            return tensor
        if name in self._in_file:
            memory = self._space.empty(name)
            own = memory[: len(tensor)].copy_(tensor)
            self._shards[name].gather_from(memory)
        elif tensor.device.type == "cpu":  # there is nothing to pin for a mesh of CPUs
            own = tensor
        else:
            own = torch.empty_like(tensor, device="cpu", pin_memory=self._shards[name].is_pinned).copy_(tensor)
        self._moved[name] = own
        return own


def _spec_of(tensor: Tensor) -> TensorSpec:
    return TensorSpec(shape=tuple(tensor.shape), dtype=tensor.dtype)


def _refuse_unused(
    offload_folder: str | os.PathLike[str], shards: Mapping[str, CpuShard], in_file: Mapping[str, TensorSpec]
) -> None:
    """Raise a ConfigError unless something goes to the file."""
    if in_file:
        return
    found = "no module was sharded with a CPUOffloadPolicy"
    if shards:
        pins = any(shard.is_pinned for shard in shards.values())
        found = "FSDP2 would pin all shards in memory" if pins else "all shards on the CPU are trained"
    raise ConfigError(
        f"offload_folder is {os.fspath(offload_folder)!r}, and nothing goes to a file in it: {found}; in shard(model), "
        "call fully_shard(block, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False)) for frozen blocks, or "
        "pass no offload_folder"
    )
