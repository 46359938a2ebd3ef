"""frozen_weights: the modules whose weights are cut into frozen shards, and their whole weights while one is merged.

An adapter beside frozen shards is a plain tensor, which torch does not add to a DTensor. And a product with some rows
may be another sum than that with all. So each process merges into the whole weight, as one process does, and keeps its
rows of what it gets.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from bigq.formats import state_name
from bigq.ops.sharding import gather_shards, placed_like, replicated_like, sharded_parameters
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["are_frozen_shards", "innermost", "note_unit", "put_back", "units_in", "whole_weights"]


class Units(Protocol):
    """What gathers the weights of modules for their calls."""

    def put_back(self) -> None:
        """Let shards stand in all modules."""

    def put_back_unit(self, index: int) -> None:
        """Let shards stand in the modules of a unit."""


# Apart from the modules, which are copied and pickled without their units. The units refer to the modules.
_UNITS: WeakKeyDictionary[nn.Module, tuple[ref[Units], int]] = WeakKeyDictionary()


def note_unit(module: nn.Module, units: Units, index: int) -> None:
    """Note that the weights of `module` itself are cut, and belong to a unit."""
    _UNITS[module] = ref(units), index


def are_frozen_shards(module: nn.Module) -> bool:
    """Whether weights of `module` itself are cut into frozen shards."""
    return module in _UNITS


def units_in(model: nn.Module) -> list[Units]:
    """What gathers weights of modules of `model`."""
    return list(dict.fromkeys(units for units, _ in _noted(model)))


def put_back(module: nn.Module) -> None:
    """Let shards stand in `module` and the modules in it, where whole weights are left from a call."""
    for units, index in dict.fromkeys(_noted(module)):
        units.put_back_unit(index)


def _noted(model: nn.Module) -> Iterator[tuple[Units, int]]:
    for module in model.modules():
        if module in _UNITS:
            held, index = _UNITS[module]
            units = held()
            assert units is not None  # the hooks of the unit hold it
            yield units, index


def innermost(layer: nn.Module) -> nn.Module:
    """What a tuner layer of PEFT adapts, below all layers between them; any other module itself."""
    base = layer._modules.get("base_layer")
    return layer if base is None else innermost(base)


@contextmanager
def whole_weights(module: nn.Module, leaf: str | None, *, writes: bool = True) -> Iterator[None]:
    """Let each process have the whole weights of `module`, and keep its rows of what they are at the end.

    Every process enters. Does nothing where no weight is in frozen shards.

    Args:
        module: any. Whole weights that stand in it are left: before a write, see `put_back`.
        leaf: the one weight, quantized or not, that is needed. None: all in `module`, also deeper ones.
        writes: whether they may change.
    """
    shards = sharded_parameters(own for own in module.modules() if own in _UNITS)
    if leaf is not None:
        described = module.descriptions.get(leaf) if isinstance(module, QuantizedModule) else None
        names = [leaf] if described is None else [state_name(leaf, part) for part in described.state_spec]
        shards = [(own, name, shard) for own, name, shard in shards if own is module and name in names]
    try:
        for own, name, shard in shards:
            own._parameters[name] = nn.Parameter(gather_shards(shard), requires_grad=False)
        yield
    finally:
        with torch.no_grad():
            for own, name, shard in shards:
                now = own._parameters[name]
                own._parameters[name] = shard
                if writes and now is not None and now is not shard:
                    shard.copy_(placed_like(replicated_like(now.detach(), shard), shard))
