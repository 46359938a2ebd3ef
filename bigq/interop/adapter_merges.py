"""adapter_merges: an adapter that was merged into a quantized weight is unmerged without a trace.

A tuner layer of PEFT holds the module that it adapts as `base_layer`. Its `merge` adds the adapter to the weight of
that module, and its `unmerge` subtracts it again. Each of the two quantizes the weight, so the second does not give
back the codes that the first has replaced. Therefore `merge` keeps them here, in host memory, until `unmerge` or until
the layer is deleted, as `merge_and_unload` does. A merge that raises an error leaves the weight as it was.

torch reports each module that becomes a part of another one. So nothing of PEFT is imported, and none of its classes is
changed: only the two methods of the layer that got a quantized module.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from bigq.interop.adapter_refusals import refuse_loftq, watch_targets
from bigq.weight.quantized_module import QuantizedModule
from bigq.weight.quantized_weight import QuantizedWeight
from bigq.weight.stored import Stored

__all__ = ["watch_adapters"]

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


class _Merge:
    """Replaces `layer.merge` and `layer.unmerge` of a tuner layer, and its `loftq_init` if it has one.

    It is a class and not a closure, so that the model pickles. It does not keep the layer alive.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        self._layer = ref(layer)
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method of the layer's class, and keep or put back the codes of the weight."""
        layer = self._layer()
        assert layer is not None
        method = getattr(type(layer), self._name)
        if not isinstance(layer.base_layer, QuantizedModule):  # it was replaced since
            return method(layer, *args, **kwargs)
        own = {"merge": _merge, "unmerge": _unmerge, _LOFTQ: refuse_loftq}[self._name]
        return own(layer, method, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Merge":
        return _Merge(memo[id(self._layer())], self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Merge, (self._layer(), self._name)


def watch_adapters() -> None:
    """From now on, give each tuner layer over a quantized module the methods of this file, and watch tuners."""
    register_module_module_registration_hook(_notice)


def _notice(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if name == _BASE and isinstance(child, QuantizedModule) and all(hasattr(type(parent), own) for own in _METHODS):
        optional = (_LOFTQ,) if hasattr(type(parent), _LOFTQ) else ()
        vars(parent).update({own: _Merge(parent, own) for own in (*_METHODS, *optional)})
    elif name == "model" and child is not None:
        watch_targets(parent, child)


def _merge(layer: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    base: QuantizedModule = layer.base_layer
    if not layer.merged:
        vars(layer)[_KEPT] = _Kept(weights=_in_host_memory(base))
    elif not _is_as_merged(layer, base):
        vars(layer).pop(_KEPT, None)
    try:
        return method(layer, *args, **kwargs)  # which may itself unmerge and merge other adapters
    finally:
        kept: _Kept | None = vars(layer).pop(_KEPT, None)
        if kept is not None and layer.merged:
            vars(layer)[_KEPT] = replace(kept, sums=_sums(base))
        elif kept is not None:  # an error came after the weight was written
            _put_back(base, kept)


def _unmerge(layer: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    base: QuantizedModule = layer.base_layer
    was_merged, is_as_merged = layer.merged, _is_as_merged(layer, base)
    result = method(layer, *args, **kwargs)
    kept: _Kept | None = vars(layer).pop(_KEPT, None)
    if kept is not None and is_as_merged and not layer.merged:
        _put_back(base, kept)
    elif was_merged:
        warnings.warn(
            f"the weight of {base} has changed since an adapter was merged into it: the adapter is subtracted from the "
            "new weight, and the difference is quantized",
            stacklevel=3,
        )
    return result


def _put_back(base: QuantizedModule, kept: _Kept) -> None:
    for leaf, (stored, dtype) in kept.weights.items():
        device = base.stored_weight(leaf).state["packed"].device
        state = {part: tensor.to(device) for part, tensor in stored.state.items()}
        weight = QuantizedWeight.of(replace(stored, state=state), dtype, partial(base.write_weight, leaf))
        base.write_weight(leaf, weight, follows=True)


def _in_host_memory(base: QuantizedModule) -> dict[str, tuple[Stored, torch.dtype]]:
    kept = {}
    for leaf, description in base.descriptions.items():
        stored = base.stored_weight(leaf)
        state = {part: tensor.detach().to("cpu", copy=True) for part, tensor in stored.state.items()}
        kept[leaf] = replace(stored, state=state), description.dtype
    return kept


def _is_as_merged(layer: Any, base: QuantizedModule) -> bool:
    kept: _Kept | None = vars(layer).get(_KEPT)
    return kept is not None and all(map(torch.equal, kept.sums, _sums(base)))


def _sums(base: QuantizedModule) -> tuple[Tensor, ...]:
    """The sums of each part along its first and its last dimension: no edit leaves them all as they were by chance."""
    states = [base.stored_weight(leaf).state for leaf in base.descriptions]
    parts = [tensor.detach() for state in states for tensor in state.values()]
    return tuple(part.sum(dim, dtype=torch.int64).cpu() for part in parts for dim in (0, -1))
