"""plan_and_place: make the plan and the device map of a load, each of which depends on the other."""

import os
import sys
from collections.abc import Iterable, Mapping
from functools import partial

import torch

from bigq.checkpoint import Source, read_small
from bigq.config import QuantizationConfig, check_offload
from bigq.errors import UnsupportedError
from bigq.formats import Description, check_quant_state, decode_quant_state
from bigq.model.tree import ModelTree
from bigq.ops.sharding import is_sharded
from bigq.planning.automatic import automatic_map
from bigq.planning.device_map import (
    STRATEGIES,
    DeviceMap,
    check_device_map,
    execution_device,
    explicit_device_map,
    is_offloaded,
    place_of,
)
from bigq.planning.make_plan import Described, make_plan, quant_states
from bigq.planning.plan import Plan
from bigq.system.text import shortlist

__all__ = ["expected_device", "plan_and_place", "plan_at"]


def plan_and_place(
    tree: ModelTree,
    source: Source,
    config: QuantizationConfig | None,
    device_map: object,
    *,
    no_split_module_classes: Iterable[str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload: str | torch.dtype | None = None,
    strict: bool = True,
    may_be_absent: bool = False,
) -> tuple[Plan, DeviceMap]:
    """Make the plan for the model of `tree`, and its device map. The arguments are those of `load_and_quantize_model`.

    `may_be_absent` says that places may be GPUs that this machine does not have, for a plan that is not carried out.

    A device map with places decides which weights are quantized, so it comes before the plan. An automatic map needs
    the sizes in the plan, so it comes after it.
    """
    check_offload(offload)
    _refuse_shards(tree)
    source.check()
    quantized = _descriptions(source)
    policy = offload if offload is not None or config is None else config.offload

    make = partial(plan_at, tree, source, config, quantized=quantized, strict=strict)
    if isinstance(device_map, str) and device_map in STRATEGIES:
        resident = make({"": "cpu"}, None)
        places = automatic_map(
            tree.model,
            resident,
            resident if policy in (None, "quantized") else make({"": "disk"}, policy),
            device_map,
            no_split_module_classes=no_split_module_classes,
            max_memory=max_memory,
            offload_folder=offload_folder,
            may_be_absent=may_be_absent,
        )
        if policy in (None, "quantized"):
            return resident, places
    else:
        places = explicit_device_map(device_map, may_be_absent=may_be_absent)
        check_device_map(places, tree.modules, [group.names for group in tree.tensors if group.persistent])
        if policy is None and config is not None:
            policy = config.formats()[0].custom_map_offload if config.formats() else None
    return make(places, policy), places


def _refuse_shards(tree: ModelTree) -> None:
    """Raise an UnsupportedError if tensors of the model are shards: with whole ones in their place, its calls fail."""
    shards = [group.names[0] for group in tree.tensors if is_sharded(group.tensor)]
    fsdp = sys.modules.get("torch.distributed.fsdp")  # to import it takes a second
    kind = getattr(fsdp, "FSDPModule", ())
    if not shards:  # after a call FSDP2 leaves the tensors of the outermost module whole
        wrapped = [module for module in tree.modules.values() if isinstance(module, kind)]
        shards = [group.names[0] for group in tree.tensors] if wrapped else []
    if shards:
        raise UnsupportedError(
            f"{len(shards)} tensors of the model are sharded (DTensor), such as by fully_shard: {shortlist(shards)}; "
            "load the model first, in each process, and then shard it; or pass mesh, and shard it in shard(model)"
        )


def plan_at(
    tree: ModelTree,
    source: Source,
    config: QuantizationConfig | None,
    places: DeviceMap,
    policy: str | torch.dtype | None,
    *,
    quantized: Described | None = None,
    strict: bool = True,
) -> Plan:
    """Make the plan for a model with the device map `places`, whose offloaded weights are stored as `policy` says."""
    kept = policy in ("preserve", torch.float32)
    dtype = policy if isinstance(policy, torch.dtype) else None
    runs_on = execution_device(places)
    names_of = {group.names[0]: group.names for group in tree.tensors}
    any_away = any(is_offloaded(place, runs_on) for place in places.values())

    def is_away(names: Iterable[str]) -> bool:
        """Whether a tensor is offloaded under all of its names."""
        found = [place for name in names if (place := place_of(places, name)) is not None]
        return bool(found) and all(is_offloaded(place, runs_on) for place in found)

    return make_plan(
        tree,
        source.tensors,
        config,
        quantized=quantized,
        unquantized=lambda name: kept and any_away and is_away(names_of[name]),
        offload_dtype=lambda name: dtype if any_away and dtype is not None and is_away(names_of[name]) else None,
        strict=strict,
        in_place=source.in_place,
    )


def expected_device(device_map: object) -> torch.device:
    """The device on which a load will most likely quantize. It is certain only after the plan."""
    automatic = isinstance(device_map, str) and device_map in STRATEGIES
    return execution_device(explicit_device_map(None if automatic else device_map))


def _descriptions(source: Source) -> dict[str, dict[str, Description]]:
    """Read the descriptions of the weights that a checkpoint holds quantized, by module name and leaf.

    Raises:
        CheckpointError: a tensor named quant_state is not one.
    """
    names = quant_states(source.tensors)
    for name in names.values():
        stored = source.tensors[name]
        check_quant_state(stored.shape, stored.dtype, f"{name} in {stored.where}")  # before its bytes are read
    found = read_small(source, [source.tensors[name] for name in names.values()])
    decoded: dict[bytes, dict[str, Description]] = {}  # layers are alike, and equal descriptions are one object
    for name, data in found.items():
        if data not in decoded:
            quant_state = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            decoded[data] = decode_quant_state(quant_state, f"{name} in {source.tensors[name].where}")
    return {module: decoded[found[name]] for module, name in names.items()}
