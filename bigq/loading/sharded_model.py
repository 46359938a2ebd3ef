"""sharded_model: a model that is sharded before it has numbers, and gets those of this process.

The quantized modules are made first, on the meta device, and sharded. Then the shards say which rows they hold.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from bigq.checkpoint import Rows
from bigq.errors import UnsupportedError
from bigq.formats import QUANT_STATE, Description, TensorSpec
from bigq.loading.commit import commit_tensor, commit_weight
from bigq.loading.cuts import cut_rows, cuts_of, rows_of
from bigq.loading.gathers import Gathers
from bigq.loading.jobs import Job
from bigq.loading.offloaded_shards import OffloadedShards
from bigq.loading.shards import Shards
from bigq.loading.timings import Timings
from bigq.model.repeated_blocks import repeated_blocks
from bigq.model.tree import assign_tensor, find_owner, held_tensor, is_dense
from bigq.ops.sharding import is_sharded
from bigq.planning.plan import Plan, PlannedWeight
from bigq.system.distributed.internals import sharded_as
from bigq.system.text import shortlist
from bigq.weight.quantized_module import QuantizedModule

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = ["ShardedTensors", "Sharding", "expected_rows", "shard_blocks", "stand_in"]


def stand_in(modules: Mapping[str, nn.Module], plan: Plan, device: torch.device) -> None:
    """Give a model the modules and tensors that `plan` says, on meta; what no source holds comes to `device`."""
    for weight in plan.weights:
        tensors = {names[0]: _on_meta(spec) for names, spec in weight.specs().items()}
        commit_weight(modules, weight, tensors)
    for planned in plan.tensors:
        tensor = _on_meta(planned.spec)
        if planned.source is None:
            own = held_tensor(modules, planned.names[0])
            tensor = own.detach().to(device, planned.spec.dtype) if is_dense(own) else own
        commit_tensor(modules, planned, tensor, frozen=False)


def shard_blocks(model: nn.Module, mesh: "DeviceMesh", *, offload: bool = False) -> None:
    """Shard each repeated block of `model`, and then the rest, with `fully_shard`; `offload` keeps shards on the CPU.

    Constants of quantized weights stay whole, because each of them would be gathered for each call: the quant_state,
    which no kernel takes, and what has one row, such as the offset of double quantization.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    policy = CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy()
    constants = [
        (module, name, parameter)
        for module in model.modules()
        if isinstance(module, QuantizedModule)
        for name, parameter in module.named_parameters(recurse=False)
        if name == QUANT_STATE or (name in module.state_spec() and len(parameter) == 1)
    ]
    for module, name, _ in constants:  # as `ignored_params` they would be looked for again and again, for 0.02 s
        module._parameters[name] = None
    try:
        for block in [*repeated_blocks(model), model]:
            fully_shard(block, mesh=mesh, offload_policy=policy)
    finally:
        for module, name, parameter in constants:
            module._parameters[name] = parameter


def expected_rows(plan: Plan, mesh: "DeviceMesh") -> dict[str, Rows]:
    """The rows of each parameter, by first name, that this process keeps if `fully_shard` shards them over `mesh`.

    Constants are left out, because they may be kept whole, and are so small that they can be cut in the end.
    """
    processes, coordinate = mesh.size(mesh.ndim - 1), (mesh.get_coordinate() or [0])[-1]
    specs = {planned.names[0]: planned.spec for planned in plan.tensors if not planned.is_buffer}
    for weight in plan.weights:
        if weight.source is not None:
            row_format, shape = weight.description.format.row_format, weight.description.shape
            specs |= {weight.tensor_name(part): spec for part, spec in row_format.state_spec(shape).items()}
    return {
        name: cut_rows(0, spec.shape[0], processes, coordinate).rows
        for name, spec in specs.items()
        if name.rpartition(".")[2] != QUANT_STATE and spec.shape and spec.shape[0] > 1
    }


class Sharding:
    """Shards a model once, when the first rows of its checkpoint have arrived and others are being read.

    `fully_shard` takes 0.2 to 0.4 ms of Python a tensor, 0.1 to 0.2 s for an 8B model. In a thread beside the one that
    quantizes, the two handed Python's lock to each other: a load took 0.92 s, and 0.78 one after the other (two H200s).

    Args:
        shard: called with `model`.
        model: that `stand_in` has prepared by `plan`.
        modules: those of the model, by name.
        plan: of the whole model.
        offload_folder: for the shards that FSDP2 keeps on the CPU, or None.
        timings: gets "shard".
    """

    def __init__(
        self,
        shard: Callable[[nn.Module], object],
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        plan: Plan,
        offload_folder: str | os.PathLike[str] | None,
        timings: Timings,
    ) -> None:
        self._shard, self._model, self._modules, self._plan, self._timings = shard, model, modules, plan, timings
        self._offload_folder = offload_folder
        self._done: tuple[nn.Module, ShardedTensors] | None = None

    def done(self) -> tuple[nn.Module, "ShardedTensors"]:
        """What `shard` returned, or the model, and the tensors in it. The first call shards it."""
        if self._done is None:
            with self._timings.timed("shard"):
                returned = self._shard(self._model)
                result = returned if isinstance(returned, nn.Module) else self._model
                tensors = ShardedTensors(self._model, self._modules, self._plan, result, self._offload_folder)
            self._done = result, tensors
        return self._done

    def moved(self, name: str, tensor: Tensor) -> Tensor:
        """The numbers of a finished tensor, by first name, where FSDP2 keeps them: see `OffloadedShards.moved`."""
        return self.done()[1].offloaded.moved(name, tensor)

    @property
    def is_resident(self) -> bool:
        """Whether all shards stay on the device. Before the model is sharded it is a guess."""
        return self._offload_folder is None if self._done is None else not self._done[1].offloaded


class ShardedTensors:
    """The tensors of a plan as they stand in a model that was sharded.

    Attributes:
        rows: those that this process keeps of each sharded tensor, by first name.
        offloaded: those that FSDP2 keeps on the CPU, or in a file.

    Args:
        model: that `stand_in` has prepared by `plan`, and that was sharded since.
        modules: those of the model before it was sharded, by name.
        plan: of the whole model.
        outermost: holds all that is sharded: `model`, or what `shard` has put around it.
        offload_folder: for the shards that FSDP2 keeps on the CPU, or None.

    Raises:
        ConfigError, PlacementError: as OffloadedShards.
        UnsupportedError: a tensor is sharded by another dimension than the first, or stands no longer in the model, or
            tensors on meta have been added to it.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        plan: Plan,
        outermost: nn.Module,
        offload_folder: str | os.PathLike[str] | None,
    ) -> None:
        names = [tensor.names[0] for tensor in plan.tensors]
        names += [own[0] for weight in plan.weights if weight.source is not None for own in weight.specs()]
        self._modules, self._plan = modules, plan
        self._tensors: dict[str, Tensor] = {name: held_tensor(modules, name) for name in names}
        _refuse_changes(model, self._tensors)
        with torch.no_grad():  # in which torch hands out what a DTensor holds without a node of autograd
            found = {name: rows_of(name, tensor) for name, tensor in self._tensors.items()}
        self.rows = {name: rows for name, rows in found.items() if rows is not None}
        self.offloaded = OffloadedShards(outermost, self._tensors, offload_folder)

    def places(self, places: Mapping[str, str]) -> dict[str, str]:
        """`places` of tensors and quantized weights, by first name, with those that are on the CPU or the disk."""
        weights = {weight.names[0]: weight.tensor_name("packed") for weight in self._plan.weights}
        return {name: self.offloaded.place(weights.get(name, name)) or place for name, place in places.items()}

    def gathers(self, shards: Shards, jobs: Iterable[Job], device: torch.device) -> Gathers:
        """What `commit` of these will gather on `device`: the scales of double quantization."""
        tensors = []
        for job, weight in _in_order(shards, jobs):
            for part, spec in _unfinished(job, weight).items():
                name = weight.tensor_name(part)  # type: ignore[union-attr]
                like = cast("DTensor", self._tensors[name])
                whole = TensorSpec(shape=(len(like), *spec.shape[1:]), dtype=spec.dtype)
                tensors.append((like.device_mesh, cuts_of(like, name), whole))
        return Gathers(tensors, device)

    def commit(self, shards: Shards, jobs: Iterable[Job], gathers: Gathers) -> None:
        """Put what `jobs` have made into the model. A process that fails still takes part in all `gathers`."""
        names = _names_by_first(shards)
        with torch.no_grad(), gathers.taken_part_in():
            for job, weight in _in_order(shards, jobs):
                unfinished, placed = _unfinished(job, weight), job.take_placed()
                if weight is not None and unfinished:
                    placed |= _finish(weight, job.planned.description, unfinished, placed, gathers)  # type: ignore[union-attr]
                for name, tensor in placed.items():
                    self._put(names[name], tensor)

    def _put(self, names: tuple[str, ...], tensor: Tensor) -> None:
        """Make the finished `tensor`, whole or the rows of this process, what stands in the model under `names`.

        It follows a cast of what stood there.
        """
        target, rows = self._tensors[names[0]], self.rows.get(names[0])
        if rows is not None and len(tensor) != len(rows):
            tensor = rows.of(tensor).clone()  # in memory of its own
        value = self.offloaded.moved(names[0], tensor.to(target.dtype))
        if is_sharded(target):
            value = sharded_as(value, target)
        if isinstance(target, nn.Parameter):
            value = nn.Parameter(value, requires_grad=target.requires_grad)
        for name in names:
            assign_tensor(*find_owner(self._modules, name), value)


def _names_by_first(shards: Shards) -> dict[str, tuple[str, ...]]:
    """All names in the model of each tensor that comes from a source, by the first."""
    names = {tensor.names[0]: tensor.names for tensor in shards.whole.tensors if tensor.source is not None}
    return names | {own[0]: own for weight in shards.whole.weights for own in weight.specs()}


def _in_order(shards: Shards, jobs: Iterable[Job]) -> list[tuple[Job, PlannedWeight | None]]:
    """`jobs` in an order that is the same in all processes; beside one that has quantized rows, the whole weight."""
    whole = {weight.names[0]: weight for weight in shards.whole.weights if weight.source is not None}
    order = {first: place for place, first in enumerate([*whole, *_names_by_first(shards)])}
    ordered = sorted(jobs, key=lambda job: order.get(job.planned.names[0], -1))
    return [(job, whole.get(job.planned.names[0])) for job in ordered]


def _unfinished(job: Job, weight: PlannedWeight | None) -> dict[str, TensorSpec]:
    """The parts of a quantized weight that its format makes of all rows, as the rows of this process are; by part."""
    if weight is None or not isinstance(job.planned, PlannedWeight):
        return {}
    own = job.planned.description  # of the rows of this process, or of all
    final = weight.description.format.state_spec(own.shape)
    return {part: spec for part, spec in own.state_spec.items() if spec != final[part]}


def _finish(
    weight: PlannedWeight,
    own: Description,
    unfinished: Mapping[str, TensorSpec],
    placed: Mapping[str, Tensor],
    gathers: Gathers,
) -> dict[str, Tensor]:
    """The parts of `weight` that its format makes of all rows, by first name.

    Args:
        own: the description of the rows of this process.
        placed: their tensors, of which the parts `unfinished` are gathered.
    """
    rows, description = {}, weight.description
    for part in own.state_spec:
        tensor = placed[weight.tensor_name(part)]
        if part in unfinished:
            whole, columns = gathers.next(tensor), tensor.shape[-1]
        else:  # each row of it is finished: `finish` gets as many rows, of no columns
            whole, columns = tensor.new_empty(*description.shape[:-1], 0, device=gathers.device), 0
        rows[part] = whole.view(prod(description.shape[:-1]), columns)
    finished = description.format.finish(rows, description.shape)
    changed = [part for part in finished if part in unfinished or part not in own.state_spec]
    return {weight.tensor_name(part): finished[part] for part in changed}


def _on_meta(spec: TensorSpec) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device="meta")


def _refuse_changes(model: nn.Module, targets: Mapping[str, Tensor]) -> None:
    """Raise an UnsupportedError unless `targets` are in `model`, by first name, and are all that is on meta there."""
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    ids, planned = {id(tensor) for tensor in held.values()}, {id(tensor) for tensor in targets.values()}
    gone = [name for name, tensor in targets.items() if id(tensor) not in ids]
    if gone:
        raise UnsupportedError(
            f"{len(gone)} tensors stand no longer in the model after shard(model): {shortlist(gone)}; "
            "shard its modules, and do not replace them or their tensors"
        )
    added = [name for name, tensor in held.items() if tensor.is_meta and id(tensor) not in planned]
    if added:
        raise UnsupportedError(
            f"{len(added)} tensors on meta were added by shard(model), and the checkpoint holds nothing for them: "
            f"{shortlist(added)}; give them numbers there"
        )
