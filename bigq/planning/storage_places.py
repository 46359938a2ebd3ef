"""storage_places: where each tensor of a plan is stored under a device map."""

from collections.abc import Iterable, Mapping
from functools import cache

from bigq.errors import PlacementError
from bigq.planning.device_map import DeviceMap, execution_device, is_gpu, is_offloaded, place_of
from bigq.planning.plan import Plan

__all__ = ["storage_places"]


def storage_places(plan: Plan, device_map: DeviceMap) -> dict[str, str]:
    """{first name: place} of each tensor, and of each quantized weight, whose tensors are all stored in one place.

    A tensor with several names is stored on the GPU if the map puts any of them there. A buffer is stored where its
    module runs, as accelerate does by default, because a module may write to it, as BatchNorm does.
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

    stored = {}
    go_with = plan.weights_of_state()
    for tensor in plan.tensors:
        place = of_tensor(go_with.get(tensor.names[0], tensor.names))
        if tensor.is_buffer and is_offloaded(place, runs_on):
            place = anywhere
        stored[tensor.names[0]] = place
    for weight in plan.weights:
        if weight.source is not None:
            stored[weight.names[0]] = of_tensor(weight.names)
    return stored


def _one_place(places: Mapping[str, str]) -> str:
    """The place of a tensor whose names have these `places`."""
    gpus = {name: place for name, place in places.items() if is_gpu(place)}
    if len(set(gpus.values())) > 1:
        listed = ", ".join(f"{name} on {place}" for name, place in gpus.items())
        raise PlacementError(f"one tensor cannot be stored on several devices: {listed}; give its names one place")
    return next(iter(gpus.values()), "cpu" if "cpu" in places.values() else "disk")
