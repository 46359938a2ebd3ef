"""aliases: whoever refers to a Parameter or buffer of a model refers to the loaded one after a load.

A list, a closure or an optimizer may hold the object itself. A load makes a new tensor, so the contents of the two are
exchanged then: the object stays, and holds what was loaded.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bigq.model.tree import ModelTree, TensorGroup, assign_tensor, find_owner, is_dense, tensor_key, tensor_table

__all__ = ["Alias", "Follower", "aliases_of"]


class Alias(NamedTuple):
    """A parameter or buffer that something beside its modules refers to, and its names."""

    names: tuple[str, ...]
    tensor: Tensor


def aliases_of(tree: ModelTree) -> list[Alias]:
    """The tensors of the model of `tree` to which more refers than its modules and `tree`, by counts of references.

    Those of an RNN are left out: its list of them is one of its own, and `assign_tensor` keeps it. So are those of a
    ScriptModule, which torch cannot exchange, because they are held in C++ too; and those that are not dense.
    """
    usual = _usual_counts()
    found = []
    for group in tree.tensors:  # a model may have 19,000
        if len(group.names) == 1 and sys.getrefcount(group.tensor) <= usual[0]:
            continue
        for names, tensor, count in _objects(tree, group):
            owner, _ = find_owner(tree.modules, names[0])
            if count > usual[1] and not isinstance(owner, (nn.RNNBase, torch.jit.ScriptModule)) and is_dense(tensor):
                found.append(Alias(names, tensor))
    return found


def _usual_counts() -> tuple[int, int]:
    """What `getrefcount` of a group's tensor, and `_objects`, say of a tensor to which nothing else refers."""
    alone = nn.Module()
    alone.register_buffer("buffer", torch.empty(0))
    tree = ModelTree(alone)
    count = next(sys.getrefcount(group.tensor) for group in tree.tensors)
    return count, next(_objects(tree, tree.tensors[0]))[2]


def _objects(tree: ModelTree, group: TensorGroup) -> Iterator[tuple[tuple[str, ...], Tensor, int]]:
    """(names, object, references to it but for those of modules and of `group`) of each object in `group`.

    `init_empty_weights` makes several objects of a tied tensor.
    """
    places: dict[int, dict[tuple[nn.Module, str], str]] = {}
    for name in group.names:
        owner, leaf = find_owner(tree.modules, name)
        places.setdefault(id(tensor_table(owner, leaf)[leaf]), {})[owner, leaf] = name
    for held in places.values():
        owner, leaf = next(iter(held))
        tensor = tensor_table(owner, leaf)[leaf]
        yield tuple(held.values()), tensor, sys.getrefcount(tensor) - len(held) - (tensor is group.tensor)


class Follower:
    """Gives the objects of `aliases` the contents of what is in their places in `modules`, and takes them back.

    One that torch cannot exchange, such as one with weak references, stays as it was, and is no part of the model. Of
    several objects of a tied tensor the first is the model's, and the others share its memory.
    """

    def __init__(self, aliases: Sequence[Alias], modules: Mapping[str, nn.Module]) -> None:
        self._aliases, self._modules = aliases, modules
        self._exchanged: list[tuple[Tensor, Tensor, object]] = []  # the object, the other, and the key of what came
        self._attributes: list[tuple[Tensor, dict[str, object]]] = []  # their own ones, which torch exchanges first

    def follow(self) -> None:
        """Exchange the contents. What raises may leave some exchanged: `undo` takes them back."""
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in dict.fromkeys(self._modules.values()) if self._aliases else ():
            for table in (module._parameters, module._buffers):
                for leaf, tensor in table.items():
                    places.setdefault(id(tensor), []).append((module, leaf))
        for names, tensor in self._aliases:
            self._follow(names, tensor, places)

    def _follow(
        self, names: Sequence[str], tensor: Tensor, places: Mapping[int, Sequence[tuple[nn.Module, str]]]
    ) -> None:
        owner, leaf = find_owner(self._modules, names[0])
        tables = (owner._parameters, owner._buffers)  # those of a ScriptModule are no dicts
        new = next((table[leaf] for table in tables if leaf in table), None)
        if new is None or new is tensor or type(new) is not type(tensor):
            return  # quantized, the same object, or none that could stand for it
        held = places.get(id(new), ())
        if not held:  # of a tied tensor another object has become the model's, and this one shares its memory
            new = new.detach() if type(new) is Tensor else nn.Parameter(new.detach(), new.requires_grad)
        self._attributes += [(tensor, vars(tensor)), (new, vars(new))]
        self._exchanged.append((tensor, new, tensor_key(new)))
        try:
            torch.utils.swap_tensors(tensor, new)  # type: ignore[no-untyped-call]
        except RuntimeError:
            return
        for module, own in held:
            assign_tensor(module, own, tensor)

    def undo(self) -> None:
        """Safe to repeat: an object whose contents are back is left alone. The tables are put back by a Snapshot."""
        for tensor, new, key in reversed(self._exchanged):
            if tensor_key(tensor) == key:
                torch.utils.swap_tensors(tensor, new)  # type: ignore[no-untyped-call]
        for tensor, own in self._attributes:  # where an interrupt came between torch's steps
            if vars(tensor) is not own:
                tensor.__dict__ = own
