"""infer_places: fill GPUs, the CPU and the disk with the modules of a model, by their sizes in bytes.

It is a pure function of a tree of names and sizes.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from bigq.errors import PlacementError
from bigq.planning.device_map import DeviceMap, ancestors, is_gpu, is_offloaded

__all__ = ["Node", "Sized", "balanced_budgets", "infer_places", "onload_nbytes"]


class Sized(NamedTuple):
    """A tensor, or all tensors of a quantized weight, with its bytes where it runs and where it is offloaded.

    `key` is equal for all names of a tensor. The two sizes differ if the offloaded tensor has another dtype.
    """

    name: str
    key: object
    nbytes: int
    offloaded_nbytes: int

    def nbytes_at(self, place: str, runs_on: torch.device) -> int:
        return self.offloaded_nbytes if is_offloaded(place, runs_on) else self.nbytes


@dataclass(frozen=True, kw_only=True)
class Node:
    """A module for `infer_places`, with its own tensors and its children.

    `is_atomic` says that it is not split, so that it has one place. `is_called` and `is_stack` tell which offloaded
    modules are blocks, whose tensors are copied to the device together: see `dispatch`.
    """

    name: str
    tensors: tuple[Sized, ...]
    children: tuple["Node", ...]
    is_atomic: bool
    is_called: bool = True
    is_stack: bool = False
    held: dict[object, Sized] = field(init=False, repr=False)  # every tensor in it and in its children, by key

    def __post_init__(self) -> None:
        held = {tensor.key: tensor for tensor in self.tensors}
        for child in self.children:
            held |= child.held
        object.__setattr__(self, "held", held)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.held.values())

    def walk(self) -> Iterator[tuple[str, "Node"]]:
        """Yield (name, node) of all that can have its own place: modules, and tensors of modules that are split."""
        yield self.name, self
        if not self.is_atomic:
            for tensor in self.tensors:
                yield tensor.name, _alone(tensor)
            for child in self.children:
                yield from child.walk()

    def largest_unit(self) -> int:
        """Bytes of the largest module that is never split."""
        if self.is_atomic or not self.children:
            return self.nbytes
        return max(child.largest_unit() for child in self.children)


def _alone(tensor: Sized) -> Node:
    return Node(name=tensor.name, tensors=(tensor,), children=(), is_atomic=True)


def balanced_budgets(root: Node, budgets: dict[str, int], strategy: str) -> dict[str, int]:
    """Lower the budgets of the GPUs so that they share the model evenly, as `strategy` says."""
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
    """Fill places with the modules of a model, both in their order.

    A module that does not fit is split into its children, unless it is atomic. A tied tensor counts once, in the place
    that it was put in first.

    If anything is offloaded, memory is kept free on the device that runs it: `buffer_nbytes`, `slots` times the size of
    the largest block, and the copies for modules that contain blocks. A GPU with less memory than that is not used.

    With one GPU, and with several if something is offloaded, modules outside of lists of blocks are placed first. The
    blocks that fit on the first GPU are spread evenly among those that are offloaded, so that it computes them while
    the blocks between them are copied. The blocks of the other GPUs follow.

    Args:
        root: the model.
        budgets: {place: bytes}, in the order in which they are filled.
        buffer_nbytes: bytes of all buffers.
        slots: how many blocks have copies on the device at a time.

    Raises:
        PlacementError: the model does not fit.
    """
    gpus = [place for place in budgets if is_gpu(place)]
    runs_on, needed = torch.device(gpus[0] if gpus else "cpu"), Counter[str]()
    while True:
        room = {place: max(0, nbytes - needed[place]) for place, nbytes in budgets.items()}
        device_map = _fill(root if len(gpus) != 1 else _stacks_last(root), room, runs_on)
        if any(is_offloaded(place, runs_on) for place in device_map.values()) and gpus:
            with suppress(PlacementError):  # another order may need a little more
                device_map = _fill(_stacks_last(root), room, runs_on)
            device_map = _strided(root, device_map, gpus[0])
        device_map = {name: device_map[name] for name, _ in root.walk() if name in device_map}
        onloaded = onload_nbytes(root, device_map, runs_on, slots=slots)
        if onloaded:
            onloaded[str(runs_on)] += buffer_nbytes
        if gpus and onloaded and (gpus[0] not in device_map.values() or onloaded[gpus[0]] > budgets[gpus[0]]):
            others = {place: nbytes for place, nbytes in budgets.items() if place != gpus[0]}
            return infer_places(root, others, buffer_nbytes=buffer_nbytes, slots=slots)
        if onloaded <= needed:
            return device_map
        needed |= onloaded


def onload_nbytes(root: Node, device_map: DeviceMap, runs_on: torch.device, *, slots: int = 2) -> Counter[str]:
    """The maximum bytes that copies of offloaded tensors take at a time, by the place that runs them."""
    split = {ancestor for name in device_map if name for ancestor in ancestors(name)}
    units: dict[str, list[tuple[Sized, str]]] = {}  # tensors and their places, by the module whose calls need them
    stored: dict[object, str] = {}

    def walk(node: Node, place: str, caller: str, block: str | None) -> None:
        place = device_map.get(node.name, place)
        if node.is_called:
            caller = node.name
            if block is None and node.name and node.name not in split and not node.is_stack:
                block = node.name
        for tensor in node.tensors:
            at = device_map.get(tensor.name, place)
            stored[tensor.key] = min(at, stored.get(tensor.key, at), key=lambda at: (not is_gpu(at), at))
            units.setdefault(caller if block is None else block, []).append((tensor, at))
        for child in node.children:
            walk(child, place, caller, block)

    walk(root, "cpu", "", None)
    copied: dict[str, tuple[str, int]] = {}
    for host, tensors in units.items():
        own_gpus = [stored[tensor.key] for tensor, _ in tensors if is_gpu(stored[tensor.key])]
        device = own_gpus[0] if own_gpus else str(runs_on)
        away = {tensor.key: tensor for tensor, _ in tensors if is_offloaded(stored[tensor.key], runs_on)}
        if away:
            copied[host] = device, sum(tensor.offloaded_nbytes for tensor in away.values())
    around = {ancestor for host in copied if host for ancestor in ancestors(host)}
    onloaded, ahead = Counter[str](), dict[str, list[int]]()
    for host, (device, nbytes) in copied.items():
        if host in around:
            onloaded[device] += nbytes
        else:
            ahead.setdefault(device, []).append(nbytes)
    for device, sizes in ahead.items():
        onloaded[device] += min(slots, len(sizes)) * max(sizes)
    return onloaded


def _stacks_last(node: Node) -> Node:
    """`node` with the children that contain lists of blocks after the others."""
    if node.is_atomic:
        return node
    return replace(node, children=tuple(sorted(map(_stacks_last, node.children), key=_holds_stack)))


def _holds_stack(node: Node) -> bool:
    return not node.is_atomic and any(child.is_atomic or _holds_stack(child) for child in node.children)


def _strided(root: Node, device_map: DeviceMap, first: str) -> DeviceMap:
    """`device_map` with the blocks on the GPU `first` spread evenly among the offloaded ones of each list of equals.

    Those of other GPUs come after them.
    """
    strided = dict(device_map)
    holders = Counter(tensor.key for node in _modules(root) for tensor in node.tensors)
    for _, node in root.walk():
        stack = [child for child in node.children if child.is_atomic and child.name in device_map]
        sizes = {(child.nbytes, sum(tensor.offloaded_nbytes for tensor in child.held.values())) for child in stack}
        if len(sizes) != 1 or any(holders[key] > 1 for child in stack for key in child.held):
            continue  # a tied tensor may be counted elsewhere
        places = [device_map[child.name] for child in stack]
        resident = [place for place in places if place == first]
        offloaded = [place for place in places if not is_gpu(place)]
        others = [place for place in places if is_gpu(place) and place != first]
        count, length = len(resident), len(resident) + len(offloaded)
        mixed = []
        for i in range(length):
            stays = (i + 1) * count // length > i * count // length
            mixed.append((resident if stays else offloaded).pop(0))
        strided |= {child.name: place for child, place in zip(stack, [*mixed, *others], strict=True)}
    return strided


def _modules(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from _modules(child)


def _fill(root: Node, budgets: dict[str, int], runs_on: torch.device) -> DeviceMap:
    places, left = list(budgets), dict(budgets)
    device_map: DeviceMap = {}
    placed: dict[object, str] = {}
    at = 0

    def assign(node: Node) -> None:
        nonlocal at
        wanted = [tensor for key, tensor in node.held.items() if key not in placed]
        already = {placed[key] for key in node.held if key in placed}
        if not wanted and len(already) == 1:  # all of its tensors are placed: they are tied, or the module was seen
            device_map[node.name] = already.pop()
            return
        while (need := sum(tensor.nbytes_at(places[at], runs_on) for tensor in wanted)) > left[places[at]]:
            if node.children and not node.is_atomic:
                for tensor in node.tensors:
                    assign(_alone(tensor))
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
        placed.update((tensor.key, places[at]) for tensor in wanted)

    assign(root)
    return device_map
