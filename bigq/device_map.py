"""Device maps: which module goes where; pure functions of names and sizes.

A place is the string "cuda:0", "cpu" or "disk". The place of a tensor is that of the longest key that is its name or an
ancestor of it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

import torch

from bigq.errors import PlacementError

__all__ = [
    "STRATEGIES",
    "DeviceMap",
    "Node",
    "as_user_map",
    "balanced_budgets",
    "check_device_map",
    "execution_device",
    "infer_places",
    "is_gpu",
    "is_offloaded",
    "normalize_device_map",
    "place_of",
]

DeviceMap = dict[str, str]
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def normalize_device_map(device_map: Mapping[str, int | str | torch.device]) -> DeviceMap:
    """`device_map` with every value as a place; refuses values that are no place on this machine."""
    if not device_map:
        raise PlacementError("device_map is empty; expected {module name: device} or {'': device}")
    return {name: _place(name, value) for name, value in device_map.items()}


def _place(name: str, value: int | str | torch.device) -> str:
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
    if index >= count:
        raise PlacementError(f"device_map[{name!r}] is {value!r}, but this machine has {count} CUDA devices")
    return f"cuda:{index}"


def as_user_map(device_map: DeviceMap) -> dict[str, int | str]:
    """`device_map` as accelerate writes it: GPUs by their index."""
    return {
        name: int(place.partition(":")[2]) if place.startswith("cuda") else place for name, place in device_map.items()
    }


def place_of(device_map: DeviceMap, name: str) -> str | None:
    """The place of the module or tensor `name`; None where the map says nothing of it."""
    while True:
        if name in device_map:
            return device_map[name]
        if not name:
            return None
        name = name.rpartition(".")[0]


def check_device_map(device_map: DeviceMap, modules: Iterable[str], tensors: Iterable[tuple[str, ...]]) -> None:
    """Refuse keys that name nothing and tensors that have no place, all of them in one error.

    `tensors` are given by all of their names; one of them has to have a place.
    """
    tensors = list(tensors)
    known = {*modules, *(name for names in tensors for name in names)}
    problems = []
    for name in device_map:
        if name not in known:
            near = ", ".join(get_close_matches(name, known, n=3))
            problems.append(f"  key {name!r} names no module or parameter" + (f"; near: {near}" if near else ""))
    everywhere = "" in device_map
    homeless = [n for n in tensors if not everywhere and all(place_of(device_map, name) is None for name in n)]
    problems += [f"  {names[0]} has no place" for names in homeless]
    if problems:
        raise PlacementError("device_map does not fit the model:\n" + "\n".join(problems))


def execution_device(device_map: DeviceMap) -> torch.device:
    """Where offloaded modules run: the first GPU of the map, or the CPU when it has none."""
    for place in device_map.values():
        if is_gpu(place):
            return torch.device(place)
    return torch.device("cpu")


def is_gpu(place: str) -> bool:
    """Whether `place` computes by itself, rather than keep what a GPU runs."""
    return place not in ("cpu", "disk")


def is_offloaded(place: str | None, runs_on: torch.device) -> bool:
    """Whether what rests at `place` runs elsewhere; "cpu" is no offload where the CPU is what runs."""
    return place == "disk" or (place == "cpu" and runs_on.type != "cpu")


@dataclass(frozen=True, kw_only=True)
class Node:
    """A module for `infer_places`: its own tensors by (name, identity, bytes), and its children."""

    name: str
    tensors: tuple[tuple[str, object, int], ...]
    children: tuple["Node", ...]
    atomic: bool
    sizes: dict[object, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = {key: nbytes for _, key, nbytes in self.tensors}
        for child in self.children:
            sizes |= child.sizes
        object.__setattr__(self, "sizes", sizes)

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    def walk(self) -> Iterator[tuple[str, "Node"]]:
        """(name, node) of everything that may have a place of its own, tensors of split modules included."""
        yield self.name, self
        if not self.atomic:
            for name, key, nbytes in self.tensors:
                yield name, Node(name=name, tensors=((name, key, nbytes),), children=(), atomic=True)
            for child in self.children:
                yield from child.walk()

    def largest_unit(self) -> int:
        """Bytes of the largest module that is never split."""
        if self.atomic or not self.children:
            return self.nbytes
        return max(child.largest_unit() for child in self.children)


def balanced_budgets(root: Node, budgets: dict[str, int], strategy: str) -> dict[str, int]:
    """`budgets` with those of the GPUs lowered so that they share the model evenly, as `strategy` says."""
    gpus = [place for place in budgets if is_gpu(place)]
    if len(gpus) < 2 or strategy == "sequential":
        return budgets
    sharing = gpus[1:] if strategy == "balanced_low_0" else gpus
    share = -(-root.nbytes // len(sharing)) + root.largest_unit()
    lowered = {place: min(budgets[place], share) for place in sharing[:-1]}
    if strategy == "balanced_low_0":
        rest = sum(min(budgets[place], share) for place in sharing)
        lowered[gpus[0]] = min(budgets[gpus[0]], max(0, root.nbytes - rest))
    return {**budgets, **lowered}


def infer_places(root: Node, budgets: dict[str, int], *, buffer_nbytes: int = 0, slots: int = 2) -> DeviceMap:
    """Fill the places of `budgets` {place: bytes}, in their order, with the modules in theirs.

    A module that does not fit is split into its children unless it is atomic; a tied tensor counts once and goes where
    it went first. If anything spills from the GPUs, room is kept on the first of them for what offloaded modules need
    there: `slots` of the largest one's size, and `buffer_nbytes`. With one GPU, what lies outside of stacks of blocks
    stays on it first, and so do blocks in even strides, whose work then hides the copies of those between.

    Raises:
        PlacementError: the model does not fit.
    """
    gpus = [place for place in budgets if is_gpu(place)]
    first = _stacks_last(root) if len(gpus) == 1 else root
    device_map, room, largest = _fill(first, budgets), dict(budgets), 0
    while gpus:
        offloaded = [node for name, node in root.walk() if not is_gpu(device_map.get(name, gpus[0]))]
        spilled = max((node.largest_unit() for node in offloaded), default=0)
        if spilled <= largest:
            break
        largest = spilled
        room[gpus[0]] = max(0, budgets[gpus[0]] - slots * largest - buffer_nbytes)
        device_map = _fill(first, room)
    if len(gpus) == 1:
        device_map = _strided(root, device_map)
    return {name: device_map[name] for name, _ in root.walk() if name in device_map}


def _stacks_last(node: Node) -> Node:
    """`node` with the children that hold stacks of blocks after the others."""
    if node.atomic:
        return node
    return replace(node, children=tuple(sorted(map(_stacks_last, node.children), key=_holds_stack)))


def _holds_stack(node: Node) -> bool:
    return not node.atomic and any(child.atomic or _holds_stack(child) for child in node.children)


def _strided(root: Node, device_map: DeviceMap) -> DeviceMap:
    """`device_map` with the GPU's share of each stack of equal blocks spread evenly over the stack."""
    strided = dict(device_map)
    for _, node in root.walk():
        stack = [child for child in node.children if child.atomic and child.name in device_map]
        alike = len({child.nbytes for child in stack}) == 1
        apart = sum(len(child.sizes) for child in stack) == len({key for child in stack for key in child.sizes})
        if not alike or not apart:
            continue
        places = [device_map[child.name] for child in stack]
        resident = [place for place in places if is_gpu(place)]
        offloaded = [place for place in places if not is_gpu(place)]
        count = len(resident)
        for i, child in enumerate(stack):
            stays = (i + 1) * count // len(stack) > i * count // len(stack)
            strided[child.name] = (resident if stays else offloaded).pop(0)
    return strided


def _fill(root: Node, budgets: dict[str, int]) -> DeviceMap:
    places, left = list(budgets), dict(budgets)
    device_map: DeviceMap = {}
    placed: dict[object, str] = {}
    at = 0

    def assign(node: Node) -> None:
        nonlocal at
        wanted = {key: nbytes for key, nbytes in node.sizes.items() if key not in placed}
        already = {placed[key] for key in node.sizes if key in placed}
        if not wanted and len(already) == 1:  # only tied tensors, or a module seen before: it has a place
            device_map[node.name] = already.pop()
            return
        need = sum(wanted.values())
        while need > left[places[at]]:
            if node.children and not node.atomic:
                for name, key, nbytes in node.tensors:
                    assign(Node(name=name, tensors=((name, key, nbytes),), children=(), atomic=True))
                for child in node.children:
                    assign(child)
                return
            at += 1
            if at == len(places):
                offered = ", ".join(f"{place} {nbytes / 1e9:.3f} GB" for place, nbytes in budgets.items())
                raise PlacementError(
                    f"the model needs {root.nbytes / 1e9:.3f} GB and does not fit: {node.name or 'it'} is left over "
                    f"({offered}); raise max_memory, or pass offload_folder to let it spill to disk"
                )
        device_map[node.name] = places[at]
        left[places[at]] -= need
        placed.update(dict.fromkeys(wanted, places[at]))

    assign(root)
    return device_map
