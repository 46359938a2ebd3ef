"""Placement: a plan and a device map that fit each other, and where each tensor comes to rest."""

import os
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from accelerate.utils import get_max_memory
from torch import nn

from bigq.checkpoint import Source
from bigq.config import QuantizationConfig, as_config, check_offload
from bigq.device_map import (
    STRATEGIES,
    DeviceMap,
    Node,
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
from bigq.errors import PlacementError
from bigq.formats import Description
from bigq.model_tensors import ModelTensors, ModelTree, tensor_name
from bigq.plan import Plan
from bigq.planning import make_plan, quantized_prefixes

__all__ = ["expected_device", "infer_device_map", "plan_and_place", "resting_places"]


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

    def plan(places: DeviceMap, policy: str | torch.dtype | None) -> Plan:
        kept = policy in ("preserve", torch.float32)
        dtype = policy if isinstance(policy, torch.dtype) else None
        runs_on = execution_device(places)
        return make_plan(
            tree,
            source.tensors,
            config,
            quantized=quantized,
            unquantized=lambda name: kept and is_offloaded(place_of(places, name), runs_on),
            offload_dtype=lambda name: dtype if is_offloaded(place_of(places, name), runs_on) else None,
            strict=strict,
        )

    if isinstance(device_map, str) and device_map in STRATEGIES:
        everything_quantized = plan({"": "cpu"}, None)
        places = _infer_from_plan(
            tree.model,
            everything_quantized,
            device_map,
            no_split_module_classes=no_split_module_classes,
            max_memory=max_memory,
            offload_folder=offload_folder,
        )
        if policy in (None, "quantized"):
            return everything_quantized, places
    else:
        places = _explicit_device_map(device_map)
        check_device_map(places, tree.modules, [group.names for group in tree.tensors if group.persistent])
        if policy is None and config is not None:
            policy = config.weight_format().custom_map_offload
    return plan(places, policy), places


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
    plan = make_plan(ModelTree(model), ModelTensors(model).tensors, as_config(quantization_config))
    places = _infer_from_plan(
        model,
        plan,
        device_map,
        no_split_module_classes=no_split_module_classes,
        max_memory=max_memory,
        offload_folder=offload_folder,
    )
    return as_user_map(places)


def _descriptions(source: Source) -> dict[str, Description]:
    """What a checkpoint says of the weights that it holds quantized, by module name."""
    prefixes = quantized_prefixes(source.tensors)
    states = dict(source.read(prefixes.values()))
    return {
        prefix: Description.decode(states[name], where=f"{name} in {source.tensors[name].where}")
        for prefix, name in prefixes.items()
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


def _infer_from_plan(
    model: nn.Module,
    plan: Plan,
    strategy: str,
    *,
    no_split_module_classes: Iterable[str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> DeviceMap:
    """The device map that `strategy` gives for the exact bytes of `plan`.

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
    root = _tree(model, plan, classes)
    buffers = {tensor.names[0]: tensor.spec.nbytes for tensor in plan.tensors if tensor.is_buffer}
    return infer_places(root, balanced_budgets(root, budgets, strategy), buffer_nbytes=sum(buffers.values()))


def _tree(model: nn.Module, plan: Plan, classes: set[str]) -> Node:
    by_module: dict[str, list[tuple[str, object, int]]] = {}
    for names, spec in plan.specs().items():
        for name in names:
            by_module.setdefault(name.rpartition(".")[0], []).append((name, names[0], spec.nbytes))

    def node(path: str, module: nn.Module, atomic: bool) -> Node:
        prefix = f"{path}." if path else ""
        listed = isinstance(module, nn.ModuleList)
        return Node(
            name=path,
            tensors=tuple(by_module.get(path, ())),
            children=tuple(
                node(prefix + name, child, listed or type(child).__name__ in classes)
                for name, child in module.named_children()
            ),
            atomic=atomic,
        )

    return node("", model, False)


def resting_places(plan: Plan, device_map: DeviceMap) -> dict[str, str]:
    """{first name: place} of each tensor and each quantized linear, all of whose tensors rest where its weight does.

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

    resting = {}
    for tensor in plan.tensors:
        place = of_names((name.rpartition(".")[0], name) for name in tensor.names)
        if tensor.is_buffer and is_offloaded(place, runs_on):
            place = anywhere
        resting[tensor.names[0]] = place
    for linear in plan.linears:
        if linear.source is not None:
            resting[linear.names[0]] = of_names((name, tensor_name(name, "weight")) for name in linear.names)
    return resting


def _one_place(places: Mapping[str, str]) -> str:
    """Where a tensor rests whose names are given these places."""
    gpus = {name: place for name, place in places.items() if is_gpu(place)}
    if len(set(gpus.values())) > 1:
        listed = ", ".join(f"{name} on {place}" for name, place in gpus.items())
        raise PlacementError(f"one tensor cannot rest on several devices: {listed}; give its names one place")
    return next(iter(gpus.values()), "cpu" if "cpu" in places.values() else "disk")
