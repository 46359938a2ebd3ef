"""Internals of torch.distributed: private names that bigq uses, each with a public way that is slower and as right."""

from collections.abc import Callable
from functools import partial
from inspect import currentframe
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "CpuShard",
    "all_gather",
    "coalesced_gather",
    "cpu_shards",
    "forget_sharding",
    "is_flattened_by_fsdp1",
    "sharded_as",
]


# Which shards FSDP2's CPUOffloadPolicy keeps on the CPU. Without this way they are left on the device: FSDP2 moves
# them at the first call, or says there that they have to be on the CPU.


class CpuShard:
    """A shard that fully_shard keeps on the CPU.

    Attributes:
        param: FSDP2's own object for it.
        is_pinned: whether it is to be in pinned memory.
        rows: how many it has with those that FSDP2 adds, so that all processes send equally many.
    """

    def __init__(self, param: Any) -> None:
        self.param = param
        self.is_pinned, self.rows = bool(param.pin_memory), int(param.padded_sharded_param_size[0])

    def gather_from(self, memory: Tensor) -> None:
        """Let FSDP2 send `memory`, of `rows` rows, of which the shard is a view.

        FSDP2 does so by itself if no row is added. Without this way it copies a shard with added rows, at the first
        call, to ordinary memory.
        """
        self.param._sharded_param_data = memory.view(-1)


def cpu_shards(module: nn.Module) -> dict[int, CpuShard]:
    """The shards, by id of their Parameter, that fully_shard keeps on the CPU for `module`.

    Empty for a module that fully_shard was not called with, and where it is not known.
    """
    if not hasattr(type(module), "_get_fsdp_state"):  # most modules; on an instance torch would word an error
        return {}
    try:
        group = module._get_fsdp_state()._fsdp_param_group  # type: ignore[operator]
        return {id(shard.sharded_param): CpuShard(shard) for shard in group.fsdp_params if shard.offload_to_cpu}
    except Exception:  # also of a state with several groups, which has no such attribute
        return {}


# A DTensor of what a process has: 3 us, and 24 the public way, which is half of the time in which a load into shards
# puts its tensors into a model. The way is tried on the first one.


def _with_spec(own: Tensor, like: Any) -> Any:
    return type(like)(own, like._spec, requires_grad=False)


def _from_local(own: Tensor, like: Any) -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _is_part(make: Callable[[Tensor, Any], Any], own: Tensor, like: Any) -> bool:
    """Whether `make` makes what `sharded_as` is to make."""
    try:
        made = make(own, like)
        described = [(type(t), t.shape, t.stride(), t.dtype, t.placements, t.device_mesh) for t in (made, like)]
        local = made.to_local()
        same = (local.data_ptr(), local.shape, made.device) == (own.data_ptr(), own.shape, own.device)
        return bool(described[0] == described[1] and same and not made.requires_grad)
    except Exception:
        return False


_makers: list[Callable[[Tensor, Any], Any]] = []  # the one that is taken, once one was tried


def sharded_as(own: Tensor, like: Any) -> Any:
    """A DTensor that is shaped and sharded as the DTensor `like`, of whose dtype this process has `own`."""
    if not _makers:
        _makers.append(_with_spec if _is_part(_with_spec, own, like) else _from_local)
    return _makers[0](own, like)


# Several gathers as one collective, which NCCL computes in one kernel. Without this way each is a collective: 15 for a
# block.

Gather = Callable[[list[Tensor], list[Tensor]], None]


def coalesced_gather(group: Any, device_type: str) -> Gather:
    """A function that gathers each input [S] of all processes of `group` into its output [processes * S].

    Its arguments are the outputs and the inputs, all of them uint8 and on the device of this process: gloo mixes up
    several dtypes (torch 2.13). What follows in the current stream has the outputs. Other backends than NCCL, and gloo
    on CPUs, gather one by one: not all of them have the method, and gloo's does not copy from GPUs.
    """
    try:
        from torch._C._distributed_c10d import AllgatherOptions

        # Its name from torch 2.13 on, and before.
        method = getattr(group, "all_gather_single_coalesced", None) or group.allgather_into_tensor_coalesced
        options = AllgatherOptions()
        options.asyncOp = False
    except (ImportError, AttributeError):
        return partial(_gather_one_by_one, group)
    if {"cuda": "nccl", "cpu": "gloo"}.get(device_type, "none") not in dist.get_backend_config(group):
        return partial(_gather_one_by_one, group)

    def gather(outputs: list[Tensor], inputs: list[Tensor]) -> None:
        work = method(outputs, inputs, options)
        if work is not None:  # NCCL in the current stream has none
            work.wait()

    return gather


def _gather_one_by_one(group: Any, outputs: list[Tensor], inputs: list[Tensor]) -> None:
    for output, own in zip(outputs, inputs, strict=True):
        all_gather(output, own, group)


def all_gather(output: Tensor, own: Tensor, group: Any) -> None:
    """Gather `own` [S] of all processes of `group` into `output` [processes * S]: a public op, which torch renamed."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    gather(output, own, group=group)


# What torch.distributed notes of a module beside its attributes. A module that gets its old attributes back is one that
# fully_shard has never seen, but it would be asked for a state that is gone. Without this way, a second attempt to
# shard it raises torch's error.


def _sharding_states() -> Any:
    try:
        from torch.distributed import _composable_state

        return _composable_state._module_state_mapping
    except (ImportError, AttributeError):
        return {}


def forget_sharding(module: nn.Module) -> None:
    """Make torch forget that `module` was sharded by fully_shard, whose other traces are attributes of the module."""
    _sharding_states().pop(module, None)


# What FSDP1 sets on each module before it puts their Parameters into one tensor, and which of these it is to ignore.
# FSDP2 sets the same attribute, in another file of torch. Without this way FSDP1 raises an error of its own, which says
# nothing of FSDP2.
_MARK, _FSDP1 = "_is_fsdp_managed_module", "torch.distributed.fsdp._dynamo_utils"


def is_flattened_by_fsdp1(module: nn.Module, name: str) -> bool:
    """Whether the `__setattr__` of `module`, which calls this with its `name`, is called by FSDP1 for integers."""
    if name != _MARK:
        return False
    # The frame of this function in a variable would be a cycle, which keeps all callers and what they hold.
    caller = getattr(getattr(currentframe(), "f_back", None), "f_back", None)
    if caller is None or caller.f_globals.get("__name__") != _FSDP1 or caller.f_back is None:
        return False
    ignored = getattr(caller.f_back.f_locals.get("self"), "__dict__", {}).get("_ignored_params")
    integers = [own for own in module.parameters(recurse=False) if not own.is_floating_point()]
    return ignored is not None and not ignored.issuperset(integers)
