"""automatic_map: the device map for a strategy such as "auto", from exact sizes in bytes; what its copies take."""

import os
from collections.abc import Iterable, Mapping

from accelerate.utils import convert_file_size_to_int, get_max_memory
from torch import nn

from bigq.formats import TensorSpec
from bigq.model.tree import is_called, is_stack
from bigq.planning.device_map import DeviceMap, execution_device, normalize_device_map
from bigq.planning.infer_places import Node, Sized, balanced_budgets, infer_places, onload_nbytes
from bigq.planning.plan import Plan
from bigq.system.memory import align

__all__ = ["automatic_map", "copies_nbytes"]


def automatic_map(
    model: nn.Module,
    resident: Plan,
    offloaded: Plan,
    strategy: str,
    *,
    no_split_module_classes: Iterable[str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    may_be_absent: bool = False,
) -> DeviceMap:
    """Make the device map of `strategy`.

    Modules of `no_split_module_classes` (by default the model's own `_no_split_modules`) and the members of a
    ModuleList are not split. The map uses the disk only if there is an `offload_folder`.

    Args:
        resident: the plan if every tensor is stored where it runs.
        offloaded: the plan if every tensor is offloaded; its tensors may have other dtypes.
        strategy: one of `STRATEGIES`.
        may_be_absent: whether `max_memory` may name GPUs that this machine does not have.

    Raises:
        PlacementError: the model does not fit, or `max_memory` names a device that this machine does not have.
    """
    classes = set(no_split_module_classes or getattr(model, "_no_split_modules", None) or ())
    budgets = _budgets(max_memory, may_be_absent)
    if offload_folder is not None:
        budgets.setdefault("disk", 1 << 62)
    root = _sized_tree(model, resident, offloaded, classes)
    buffer_nbytes = sum(  # at the larger of their two sizes
        max(spec.nbytes for spec in specs)
        for specs in zip(_buffer_specs(resident), _buffer_specs(offloaded), strict=True)
    )
    return infer_places(root, balanced_budgets(root, budgets, strategy), buffer_nbytes=buffer_nbytes)


def copies_nbytes(model: nn.Module, plan: Plan, device_map: DeviceMap) -> dict[str, int]:
    """The maximum bytes that copies of offloaded tensors take while the model runs, by the place that runs them."""
    root = _sized_tree(model, plan, plan, set())
    return dict(onload_nbytes(root, device_map, execution_device(device_map)))


def _budgets(max_memory: Mapping[int | str, int | str] | None, may_be_absent: bool) -> dict[str, int]:
    """{place: bytes}, GPUs first: those of `max_memory`, or what this machine has."""
    if max_memory is None:
        found = get_max_memory()
    else:
        limits = {f"max_memory[{place!r}]": place for place in max_memory}
        normalize_device_map(limits, may_be_absent=may_be_absent)  # raises if one is absent
        if may_be_absent:  # get_max_memory would warn of it
            nbytes = {place: convert_file_size_to_int(limit) for place, limit in max_memory.items()}
            found = dict(sorted(nbytes.items(), key=lambda item: (isinstance(item[0], str), item[0])))
        else:
            found = get_max_memory(dict(max_memory))
        found.setdefault("cpu", 0)
    return {place if isinstance(place, str) else f"cuda:{place}": int(nbytes) for place, nbytes in found.items()}


def _buffer_specs(plan: Plan) -> list[TensorSpec]:
    return [tensor.spec for tensor in plan.tensors if tensor.is_buffer]


def _sized_tree(model: nn.Module, resident: Plan, offloaded: Plan, classes: set[str]) -> Node:
    """The modules of `model` as Nodes, with the sizes of their tensors where they run and where they are offloaded.

    A quantized weight is one entry, because all of its tensors are stored together. Offloaded sizes are aligned as the
    memory is.
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
