"""automatic_map: the device map for a strategy such as "auto", from exact sizes in bytes."""

import os
from collections.abc import Iterable, Mapping

from accelerate.utils import get_max_memory
from torch import nn

from bigq.formats import TensorSpec
from bigq.model.tree import is_called, is_stack
from bigq.planning.device_map import DeviceMap, normalize_device_map
from bigq.planning.infer_places import Node, Sized, balanced_budgets, infer_places
from bigq.planning.plan import Plan
from bigq.system.memory import align

__all__ = ["automatic_map"]


def automatic_map(
    model: nn.Module,
    resident: Plan,
    offloaded: Plan,
    strategy: str,
    *,
    no_split_module_classes: Iterable[str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> DeviceMap:
    """Make the device map of `strategy`.

    Modules of `no_split_module_classes` (by default the model's own `_no_split_modules`) and the members of a
    ModuleList are not split. The map uses the disk only if there is an `offload_folder`.

    Args:
        resident: the plan if every tensor is stored where it runs.
        offloaded: the plan if every tensor is offloaded; its tensors may have other dtypes.
        strategy: one of `STRATEGIES`.

    Raises:
        PlacementError: the model does not fit, or `max_memory` names a device that this machine does not have.
    """
    classes = set(no_split_module_classes or getattr(model, "_no_split_modules", None) or ())
    if max_memory is not None:
        normalize_device_map({f"max_memory[{place!r}]": place for place in max_memory})  # raises if one is absent
    budgets = {
        place if isinstance(place, str) else f"cuda:{place}": int(nbytes)
        for place, nbytes in get_max_memory(dict(max_memory) if max_memory is not None else None).items()
    }
    if max_memory is not None:
        budgets.setdefault("cpu", 0)
    if offload_folder is not None:
        budgets.setdefault("disk", 1 << 62)
    root = _sized_tree(model, resident, offloaded, classes)
    buffer_nbytes = sum(  # at the larger of their two sizes
        max(spec.nbytes for spec in specs)
        for specs in zip(_buffer_specs(resident), _buffer_specs(offloaded), strict=True)
    )
    return infer_places(root, balanced_budgets(root, budgets, strategy), buffer_nbytes=buffer_nbytes)


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
