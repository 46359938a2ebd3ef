"""adapter_merges: an adapter that was merged into a quantized weight is unmerged without a trace.

A tuner layer of PEFT holds the module that it adapts as `base_layer`. Its `merge` adds the adapter to the weight of
that module, and its `unmerge` subtracts it again. Each of the two quantizes the weight, so the second does not give
back the codes that the first has replaced. Therefore `merge` keeps them here, in host memory, until `unmerge` or until
the layer is deleted, as `merge_and_unload` does. A merge that raises an error leaves the weight as it was.

torch reports each module that becomes a part of another one. So nothing of PEFT is imported, and none of its classes is
changed: only these methods of the layer that got a quantized module, and the forward of one over experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from bigq.interop.adapter_refusals import refuse_loftq, refuse_slices_below, watch_targets
from bigq.interop.expert_adapters import adapted_forward, adapted_leaf, adapted_module
from bigq.interop.frozen_weights import are_frozen_shards, innermost, put_back, whole_weights
from bigq.interop.whole_adapters import on_devices_of_mesh, whole_adapters
from bigq.ops.sharding import in_all, local_part
from bigq.system.user_warnings import warn
from bigq.weight.quantized_module import QuantizedModule
from bigq.weight.quantized_weight import QuantizedWeight
from bigq.weight.stored import Stored

__all__ = ["watch_adapters", "watch_merges"]

_BASE, _METHODS, _KEPT = "base_layer", ("merge", "unmerge"), "_bigq_kept"
_LOFTQ = "loftq_init"  # of layers of LoRA


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What a merge has replaced.

    Args:
        weights: the weights before the merge, in host memory, and the dtype that each had, by the name of the leaf.
        sums: of the codes and scales after the merge, to see whether anything else has changed them since.
    """

    weights: dict[str, tuple[Stored, torch.dtype]]
    sums: tuple[Tensor, ...] = ()


class _Method:
    """Replaces a method of a tuner layer: `merge`, `unmerge`, and `loftq_init` or `forward` where they are watched.

    It is a class and not a closure, so that the model pickles. It does not keep the layer alive.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        self._layer = ref(layer)
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do what bigq does around the method of the layer's class, or in its place."""
        layer = self._layer()
        assert layer is not None
        method = getattr(type(layer), self._name)
        if adapted_module(layer) is not None:
            return _OWN[self._name](layer, method, args, kwargs)
        if self._name in _METHODS:
            return _in_frozen_shards(layer, method, args, kwargs)
        return method(layer, *args, **kwargs)  # the quantized module was replaced since

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Method":
        return _Method(memo[id(self._layer())], self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Method, (self._layer(), self._name)


def watch_adapters() -> None:
    """From now on, give each tuner layer over a quantized module the methods of this file, and watch tuners."""
    register_module_module_registration_hook(_notice)


def watch_merges(model: nn.Module) -> None:
    """Give each tuner layer in `model` over weights that were cut into frozen shards the methods that merge there."""
    for layer in model.modules():
        base = layer._modules.get(_BASE)
        if base is not None and adapted_module(layer) is None:
            _watch_kept(layer, base)


def _watch_kept(layer: nn.Module, base: nn.Module) -> None:
    """Give `layer` the methods that merge into frozen shards if it is a tuner layer over some that are not quantized.

    Args:
        layer: any module.
        base: that is, or becomes, its `base_layer`.
    """
    if all(hasattr(type(layer), method) for method in _METHODS) and any(map(are_frozen_shards, base.modules())):
        vars(layer).update({method: _Method(layer, method) for method in _METHODS})


def _notice(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if name == _BASE and child is not None:
        kind, own = type(parent), list(_METHODS)
        # the child is no part of the parent yet
        base = child if isinstance(child, QuantizedModule) else adapted_module(child) if adapted_leaf(parent) else None
        if base is None:
            _watch_kept(parent, child)
        if base is None or not all(hasattr(kind, method) for method in _METHODS):
            return
        refuse_slices_below(parent, base)
        own += [_LOFTQ] if hasattr(kind, _LOFTQ) else []
        own += ["forward"] if adapted_leaf(parent) else []
        vars(parent).update({method: _Method(parent, method) for method in own})
    elif name == "model" and child is not None:
        watch_targets(parent, child)
    elif isinstance(child, QuantizedModule) and child.was_changed:  # it takes the place of a tuner layer again
        child.forget_changes()


def _in_frozen_shards(layer: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Merge or unmerge as PEFT does, in whole weights where they are cut into frozen shards, and not quantized."""
    base = innermost(layer)
    put_back(base)
    with whole_weights(base, adapted_leaf(layer)):
        return method(layer, *args, **kwargs)


def _merge(layer: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    base, leaf = _adapted(layer)[0], adapted_leaf(layer)
    put_back(base)
    if not layer.merged:
        vars(layer)[_KEPT] = _Kept(weights=_in_host_memory(layer))
    elif not _is_as_merged(layer):
        vars(layer).pop(_KEPT, None)
    try:
        with whole_weights(base, leaf), on_devices_of_mesh(base), whole_adapters(layer, base):
            return method(layer, *args, **kwargs)  # which may itself unmerge and merge other adapters
    finally:
        kept: _Kept | None = vars(layer).pop(_KEPT, None)
        if kept is not None and layer.merged:
            vars(layer)[_KEPT] = replace(kept, sums=_sums(layer))
        elif kept is not None:  # an error came after the weight was written
            _put_back(layer, kept)


def _unmerge(layer: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    base, leaf = _adapted(layer)[0], adapted_leaf(layer)
    put_back(base)
    was_merged, is_as_merged = layer.merged, _is_as_merged(layer)
    with whole_weights(base, leaf), on_devices_of_mesh(base), whole_adapters(layer, base):
        result = method(layer, *args, **kwargs)
    kept: _Kept | None = vars(layer).pop(_KEPT, None)
    if kept is not None and is_as_merged and not layer.merged:
        _put_back(layer, kept)
    elif was_merged:
        warn(
            f"the weight of {base} has changed since an adapter was merged into it: the adapter is "
            "subtracted from the new weight, and the difference is quantized",
        )
    return result


_OWN = {"merge": _merge, "unmerge": _unmerge, _LOFTQ: refuse_loftq, "forward": adapted_forward}


def _adapted(layer: nn.Module) -> tuple[QuantizedModule, list[str]]:
    """The quantized module that `layer` adapts, and the leaves of the weights that a merge changes."""
    base = adapted_module(layer)
    assert base is not None
    leaf = adapted_leaf(layer)
    return base, list(base.descriptions) if leaf is None else [leaf]


def _put_back(layer: nn.Module, kept: _Kept) -> None:
    base, _ = _adapted(layer)
    for leaf, (stored, dtype) in kept.weights.items():
        device = base.stored_weight(leaf).state["packed"].device
        state = {part: tensor.to(device) for part, tensor in stored.state.items()}
        weight = QuantizedWeight.of(replace(stored, state=state), dtype, partial(base.write_weight, leaf))
        base.write_weight(leaf, weight, follows=True)


def _in_host_memory(layer: nn.Module) -> dict[str, tuple[Stored, torch.dtype]]:
    base, leaves = _adapted(layer)
    kept = {}
    for leaf in leaves:
        stored = base.stored_weight(leaf)
        state = {part: tensor.detach().to("cpu", copy=True) for part, tensor in stored.state.items()}
        kept[leaf] = replace(stored, state=state), base.descriptions[leaf].dtype
    return kept


def _is_as_merged(layer: nn.Module) -> bool:
    kept: _Kept | None = vars(layer).get(_KEPT)
    if kept is None:
        return False
    base, leaves = _adapted(layer)
    same = all(map(torch.equal, kept.sums, _sums(layer)))
    return in_all(same, base.stored_weight(leaves[0]).state["packed"])


def _sums(layer: nn.Module) -> tuple[Tensor, ...]:
    """The sums of each part along its first and its last dimension: no edit leaves them all as they were by chance.

    Of a sharded part, those of what this process holds.
    """
    base, leaves = _adapted(layer)
    states = [base.stored_weight(leaf).state for leaf in leaves]
    parts = [local_part(tensor.detach()) for state in states for tensor in state.values()]
    return tuple(part.sum(dim, dtype=torch.int64).cpu() for part in parts for dim in (0, -1))
