"""Placement: a plan and a device map that fit each other, and where each tensor comes to rest."""

import os
from collections.abc import Iterable, Mapping
from functools import cache, partial
from typing import Any

import torch
from accelerate.utils import get_max_memory
from torch import nn

from bigq.checkpoint import Source
from bigq.config import QuantizationConfig, as_config, check_offload
from bigq.errors import PlacementError
from bigq.formats import Description, TensorSpec, check_quant_state, decode_quant_state
from bigq.model.tree import ModelTensors, ModelTree
from bigq.offload.space import align
from bigq.planning.device_map import (
    STRATEGIES,
    DeviceMap,
    Node,
    Sized,
    as_user_map,
    balanced_budgets,
    check_device_map,
    execution_device,
    infer_places,
    is_gpu,
    is_offloaded,
    normalize_device_map,
    place_of,
)
from bigq.planning.make_plan import Described, make_plan, quant_states
from bigq.planning.plan import Plan

__all__ = ["expected_device", "infer_device_map", "is_called", "is_stack", "plan_and_place", "resting_places"]


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
) -> tuple[Plan, DeviceMap]:
    """The plan for the model of `tree`, and its places; the arguments are those of `load_and_quantize_model`.

    A map that names places decides what is quantized, so it comes before the plan; an automatic one needs its sizes.
    """
    check_offload(offload)
    source.check()
    quantized = _descriptions(source)
    policy = offload if offload is not None or config is None else config.offload

    make = partial(_make_plan, tree, source, config, quantized=quantized, strict=strict)
    if isinstance(device_map, str) and device_map in STRATEGIES:
        resident = make({"": "cpu"}, None)
        places = _infer(
            tree.model,
            resident,
            resident if policy in (None, "quantized") else make({"": "disk"}, policy),
            device_map,
            no_split_module_classes=no_split_module_classes,
            max_memory=max_memory,
            offload_folder=offload_folder,
        )
        if policy in (None, "quantized"):
            return resident, places
    else:
        places = _explicit_device_map(device_map)
        check_device_map(places, tree.modules, [group.names for group in tree.tensors if group.persistent])
        if policy is None and config is not None:
            policy = config.weight_format().custom_map_offload
    return make(places, policy), places


def _make_plan(
    tree: ModelTree,
    source: Source,
    config: QuantizationConfig | None,
    places: DeviceMap,
    policy: str | torch.dtype | None,
    *,
    quantized: Described | None = None,
    strict: bool = True,
) -> Plan:
    """The plan for a model at `places`, of which what is offloaded is kept as `policy` says."""
    kept = policy in ("preserve", torch.float32)
    dtype = policy if isinstance(policy, torch.dtype) else None
    runs_on = execution_device(places)
    names_of = {group.names[0]: group.names for group in tree.tensors}
    any_away = any(is_offloaded(place, runs_on) for place in places.values())

    def is_away(names: Iterable[str]) -> bool:
        """Whether something rests elsewhere than where it runs: it does not if any of its names keeps it there."""
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
    )


def expected_device(device_map: object) -> torch.device:
    """Where a load under `device_map` will most likely quantize, which is known for sure only after the plan."""
    automatic = isinstance(device_map, str) and device_map in STRATEGIES
    return execution_device(_explicit_device_map(None if automatic else device_map))


def infer_device_map(
    model: nn.Module,
    quantization_config: Any,
    device_map: str = "auto",
    *,
    no_split_module_classes: Iterable[str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> dict[str, int | str]:
    """The device map that `load_and_quantize_model` would make for `model`, to look at or to edit; changes nothing.

    Args:
        model: a skeleton or a model with weights; the dtypes of its parameters stand for those of the checkpoint.
        quantization_config: as for `load_and_quantize_model`.
        device_map: "auto", "balanced", "balanced_low_0" or "sequential".
        no_split_module_classes, max_memory: as for `load_and_quantize_model`.
        offload_folder: any folder lets the map use "disk"; nothing is written.

    Raises:
        PlacementError: the quantized model does not fit.
    """
    if device_map not in STRATEGIES:
        raise PlacementError(f"device_map is {device_map!r}; expected one of {list(STRATEGIES)}")
    tree, config = ModelTree(model), as_config(quantization_config)
    make = partial(_make_plan, tree, ModelTensors(model), config)
    places = _infer(
        model,
        make({"": "cpu"}, None),
        make({"": "disk"}, config.offload),
        device_map,
        no_split_module_classes=no_split_module_classes,
        max_memory=max_memory,
        offload_folder=offload_folder,
    )
    return as_user_map(places)


def _descriptions(source: Source) -> dict[str, dict[str, Description]]:
    """What a checkpoint says of the weights that it holds quantized, by module name and leaf.

    Raises:
        CheckpointError: a quant_state is none.
    """
    names = quant_states(source.tensors)
    for name in names.values():
        stored = source.tensors[name]
        check_quant_state(stored.shape, stored.dtype, f"{name} in {stored.where}")  # before any of it is read
    states = dict(source.read(names.values()))
    return {
        module: decode_quant_state(states[name], f"{name} in {source.tensors[name].where}")
        for module, name in names.items()
    }


def _explicit_device_map(device_map: object) -> DeviceMap:
    if device_map is None:
        return {"": f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"}
    if isinstance(device_map, Mapping):
        return normalize_device_map(device_map)
    if isinstance(device_map, (int, torch.device)):
        return normalize_device_map({"": device_map})
    if isinstance(device_map, str) and (device_map == "cpu" or device_map.startswith("cuda")):
        return normalize_device_map({"": device_map})
    raise PlacementError(f"device_map is {device_map!r}; expected one of {list(STRATEGIES)}, a device or a dict")


def _infer(
    model: nn.Module,
    resident: Plan,
    offloaded: Plan,
    strategy: str,
    *,
    no_split_module_classes: Iterable[str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> DeviceMap:
    """The device map that `strategy` gives for the exact bytes of a model: see `_tree` for the two plans.

    Modules of `no_split_module_classes` (by default the model's own `_no_split_modules`) and the members of a
    ModuleList stay whole. The disk takes part only with an `offload_folder`.
    """
    classes = set(no_split_module_classes or getattr(model, "_no_split_modules", None) or ())
    if max_memory is not None:
        normalize_device_map({f"max_memory[{place!r}]": place for place in max_memory})  # refuses absent devices
    budgets = {
        place if isinstance(place, str) else f"cuda:{place}": int(nbytes)
        for place, nbytes in get_max_memory(dict(max_memory) if max_memory is not None else None).items()
    }
    if max_memory is not None:
        budgets.setdefault("cpu", 0)
    if offload_folder is not None:
        budgets.setdefault("disk", 1 << 62)
    root = _tree(model, resident, offloaded, classes)
    buffer_nbytes = sum(  # at the larger of their two sizes
        max(spec.nbytes for spec in specs)
        for specs in zip(_buffer_specs(resident), _buffer_specs(offloaded), strict=True)
    )
    return infer_places(root, balanced_budgets(root, budgets, strategy), buffer_nbytes=buffer_nbytes)


def _buffer_specs(plan: Plan) -> list[TensorSpec]:
    return [tensor.spec for tensor in plan.tensors if tensor.is_buffer]


def _tree(model: nn.Module, resident: Plan, offloaded: Plan, classes: set[str]) -> Node:
    """The modules of `model` with their sizes: in `resident` everything is where it runs, in `offloaded` nothing.

    A quantized weight is one entry, since all of its tensors go with it. What is offloaded is aligned as its memory is.
    """
    away = {names[0]: sum(map(align, sizes)) for names, sizes in offloaded.sizes()}
    by_module: dict[str, list[Sized]] = {}
    for names, sizes in resident.sizes():
        for name in names:
            sized = Sized(name, names[0], sum(sizes), away[names[0]])
            by_module.setdefault(name.rpartition(".")[0], []).append(sized)

    def node(path: str, module: nn.Module, is_atomic: bool) -> Node:
        prefix = f"{path}." if path else ""
        listed = isinstance(module, nn.ModuleList)
        return Node(
            name=path,
            tensors=tuple(by_module.get(path, ())),
            children=tuple(
                node(prefix + name, child, listed or type(child).__name__ in classes)
                for name, child in module._modules.items()
                if child is not None
            ),
            is_atomic=is_atomic,
            is_called=is_called(module),
            is_stack=is_stack(module),
        )

    return node("", model, False)


def is_called(module: nn.Module) -> bool:
    """Whether the module has a forward of its own that a hook can stand in front of.

    A ModuleList, a ModuleDict or a ParameterList has none, and that of a ScriptModule cannot be replaced.
    """
    return not isinstance(module, torch.jit.ScriptModule) and type(module).forward is not nn.Module.forward


def is_stack(module: nn.Module) -> bool:
    """Whether the module holds a list of modules, or is a Sequential of composite ones: its members are the blocks."""
    if isinstance(module, nn.Sequential):
        return any(any(True for _ in child.children()) for child in module.children())
    return any(isinstance(child, (nn.ModuleList, nn.ModuleDict)) and len(child) for child in module.children())


def resting_places(plan: Plan, device_map: DeviceMap) -> dict[str, str]:
    """{first name: place} of each tensor and each quantized weight, all of whose tensors rest in one place.

    What has several names rests on the GPU if any of them does. Buffers rest where they run, as accelerate has it by
    default: a module may write to them, as BatchNorm does.
    """
    runs_on = execution_device(device_map)
    anywhere = str(runs_on)  # for non-persistent buffers that the map may leave out
    whole = device_map[""] if len(device_map) == 1 and "" in device_map else None  # the model in one place

    @cache  # thousands of modules hold several tensors each
    def of_module(name: str) -> str | None:
        return place_of(device_map, name)

    def of_name(owner: str, name: str) -> str | None:
        return device_map[name] if name in device_map else of_module(owner)

    def of_names(names: Iterable[tuple[str, str]]) -> str:
        if whole is not None:
            return whole
        places = {name: place for owner, name in names if (place := of_name(owner, name))}
        return _one_place(places) if len(places) > 1 else next(iter(places.values()), anywhere)

    def of_tensor(names: Iterable[str]) -> str:
        return of_names((name.rpartition(".")[0], name) for name in names)

    resting = {}
    go_with = plan.weights_of_state()
    for tensor in plan.tensors:
        place = of_tensor(go_with.get(tensor.names[0], tensor.names))
        if tensor.is_buffer and is_offloaded(place, runs_on):
            place = anywhere
        resting[tensor.names[0]] = place
    for weight in plan.weights:
        if weight.source is not None:
            resting[weight.names[0]] = of_tensor(weight.names)
    return resting


def _one_place(places: Mapping[str, str]) -> str:
    """Where a tensor rests whose names are given these places."""
    gpus = {name: place for name, place in places.items() if is_gpu(place)}
    if len(set(gpus.values())) > 1:
        listed = ", ".join(f"{name} on {place}" for name, place in gpus.items())
        raise PlacementError(f"one tensor cannot rest on several devices: {listed}; give its names one place")
    return next(iter(gpus.values()), "cpu" if "cpu" in places.values() else "disk")
