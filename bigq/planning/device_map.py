"""Device maps: the place of each module and tensor. Pure functions of names.

A place is the string "cuda:0", "cpu" or "disk". The place of a tensor is the value of the longest key that is its name,
or the name of a module around it.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

import torch

from bigq.errors import PlacementError
from bigq.planning.mismatch import SHOWN, listed

__all__ = [
    "STRATEGIES",
    "DeviceMap",
    "ancestors",
    "as_user_map",
    "check_device_map",
    "execution_device",
    "explicit_device_map",
    "is_gpu",
    "is_offloaded",
    "normalize_device_map",
    "place_of",
]

DeviceMap = dict[str, str]
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def explicit_device_map(device_map: object, *, may_be_absent: bool = False) -> DeviceMap:
    """Normalize a `device_map` that is no strategy. None: the current GPU, or the CPU if there is none."""
    if device_map is None:
        return {"": f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"}
    if isinstance(device_map, Mapping):
        return normalize_device_map(device_map, may_be_absent=may_be_absent)
    if isinstance(device_map, (int, torch.device)):
        return normalize_device_map({"": device_map}, may_be_absent=may_be_absent)
    if isinstance(device_map, str) and (device_map == "cpu" or device_map.startswith("cuda")):
        return normalize_device_map({"": device_map}, may_be_absent=may_be_absent)
    raise PlacementError(f"device_map is {device_map!r}; expected one of {list(STRATEGIES)}, a device or a dict")


def normalize_device_map(
    device_map: Mapping[str, int | str | torch.device], *, may_be_absent: bool = False
) -> DeviceMap:
    """Return `device_map` with a place for each value.

    Raises PlacementError for a device that is absent, unless `may_be_absent`: a plan may be one for another machine.
    """
    if not device_map:
        raise PlacementError("device_map is empty; expected {module name: device} or {'': device}")
    return {name: _place(name, value, may_be_absent) for name, value in device_map.items()}


def _place(name: str, value: int | str | torch.device, may_be_absent: bool) -> str:
    if value == "disk":
        return "disk"
    try:
        device = torch.device("cuda", value) if isinstance(value, int) else torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise PlacementError(
            f"device_map[{name!r}] is {value!r}; expected a GPU index, a device, 'cpu' or 'disk'"
        ) from error
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        raise PlacementError(f"device_map[{name!r}] is {value!r}; bigq runs on CUDA devices and the CPU")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index if device.index is not None else (torch.cuda.current_device() if count else 0)
    if index >= count and not may_be_absent:
        raise PlacementError(f"device_map[{name!r}] is {value!r}, but this machine has {count} CUDA devices")
    return f"cuda:{index}"


def as_user_map(device_map: DeviceMap) -> dict[str, int | str]:
    """Return `device_map` in accelerate's form, with the index of each GPU."""
    return {
        name: int(place.partition(":")[2]) if place.startswith("cuda") else place for name, place in device_map.items()
    }


def place_of(device_map: DeviceMap, name: str) -> str | None:
    """The place of the module or tensor `name`; None if no key covers it."""
    while True:
        if name in device_map:
            return device_map[name]
        if not name:
            return None
        name = name.rpartition(".")[0]


def check_device_map(device_map: DeviceMap, modules: Iterable[str], tensors: Iterable[tuple[str, ...]]) -> None:
    """Raise one PlacementError for all keys that name nothing and all tensors that have no place.

    Args:
        device_map: to check.
        modules: names of all modules.
        tensors: all names of each tensor, of which at least one must have a place.
    """
    tensors = list(tensors)
    known = {*modules, *(name for names in tensors for name in names)}
    unknown = [name for name in device_map if name not in known]
    near = {name: get_close_matches(name, known, n=3) for name in unknown[:SHOWN]}
    everywhere = "" in device_map
    unplaced = [n for n in tensors if not everywhere and all(place_of(device_map, name) is None for name in n)]
    sections = [
        (
            f"{len(unknown)} of {len(device_map)} keys name no module or parameter"
            + (", the map of another model?" if len(unknown) == len(device_map) else ""),
            [
                f"  key {name!r} names no module or parameter"
                + (f"; near: {', '.join(near[name])}" if near.get(name) else "")
                for name in unknown
            ],
        ),
        (
            f"{len(unplaced)} of {len(tensors)} tensors have no place",
            [f"  {names[0]} has no place" for names in unplaced],
        ),
    ]
    problems = [f"{title}:\n{listed(lines)}" for title, lines in sections if lines]
    if problems:
        raise PlacementError("device_map does not fit the model:\n" + "\n".join(problems))


def execution_device(device_map: DeviceMap) -> torch.device:
    """The device that runs offloaded modules: the first GPU of the map, or the CPU if the map has none."""
    for place in device_map.values():
        if is_gpu(place):
            return torch.device(place)
    return torch.device("cpu")


def is_gpu(place: str) -> bool:
    """Whether `place` is a GPU."""
    return place not in ("cpu", "disk")


def is_offloaded(place: str | None, runs_on: torch.device) -> bool:
    """Whether a tensor stored in `place` is offloaded. "cpu" is no offload if the CPU runs the model."""
    return place == "disk" or (place == "cpu" and runs_on.type != "cpu")


def ancestors(name: str) -> list[str]:
    """The names of the modules around the module or tensor `name`, from the root "" on."""
    parts = name.split(".")
    return ["", *(".".join(parts[:end]) for end in range(1, len(parts)))]
