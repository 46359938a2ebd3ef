"""ModelTree: the modules and tensors of a model, each under all of its names."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bigq.errors import UnsupportedError
from bigq.system.internals import sparse_parts
from bigq.system.text import shortlist

__all__ = [
    "ModelTree",
    "TensorGroup",
    "assign_tensor",
    "find_owner",
    "held_tensor",
    "is_called",
    "is_dense",
    "is_stack",
    "nbytes_of",
    "shape_of",
    "tensor_key",
    "tensor_name",
    "tensor_table",
]


class TensorGroup(NamedTuple):
    """A parameter or buffer with all of its names. It has several if it is tied, or its module has several parents."""

    names: tuple[str, ...]
    tensor: Tensor
    is_buffer: bool
    persistent: bool


def tensor_name(module_name: str, leaf: str) -> str:
    """The name in the model of the tensor `leaf` of a module; the name of the model itself is ""."""
    return f"{module_name}.{leaf}" if module_name else leaf


class ModelTree:
    """The modules and tensors of `model` by all of their names. The model is walked once, so it must not change.

    The tree keeps the tensors alive until `forget_tensors`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every module under each of its names; the model itself is the first, as "".

        The result is that of `named_modules(remove_duplicate=False)`. Without a generator for each level it takes a
        third of the time.
        """
        found: dict[str, nn.Module] = {}
        _walk(self.model, "", found)
        return found

    @cached_property
    def aliases(self) -> dict[nn.Module, tuple[str, ...]]:
        """{module: all of its names}; the model itself is the first."""
        names: dict[nn.Module, list[str]] = {}
        for name, module in self.modules.items():
            names.setdefault(module, []).append(name)
        return {module: tuple(aliases) for module, aliases in names.items()}

    @cached_property
    def tensors(self) -> list[TensorGroup]:
        """Every parameter and buffer once, in module order.

        Raises:
            UnsupportedError: a lazy module has not been called yet, so its parameters have no shapes.
        """
        try:
            return self._groups()
        except ValueError as error:  # torch's, of the first of them
            lazy = [
                tensor_name(path, leaf)
                for path, module in self.modules.items()
                for table in (module._parameters, module._buffers)
                for leaf, tensor in table.items()
                if tensor is not None and is_lazy(tensor)
            ]
            if not lazy:
                raise
            raise UnsupportedError(
                f"{len(lazy)} tensors of {type(self.model).__name__} have no shapes before its first call: "
                f"{shortlist(lazy)}; call the model once, so that its lazy modules know their sizes"
            ) from error

    def _groups(self) -> list[TensorGroup]:
        groups: dict[object, TensorGroup] = {}
        for path, module in self.modules.items():
            for table in (module._parameters, module._buffers):
                for leaf, tensor in table.items():
                    if tensor is None:
                        continue
                    name, key = tensor_name(path, leaf), tensor_key(tensor)
                    names: tuple[str, ...] = (name,)
                    persistent = leaf not in module._non_persistent_buffers_set
                    if key in groups:
                        names, persistent = (*groups[key].names, name), groups[key].persistent or persistent
                    groups[key] = TensorGroup(names, tensor, table is module._buffers, persistent)
        return list(groups.values())

    def forget_tensors(self) -> None:
        """Let go of the tensors, so that the model may free them one by one."""
        vars(self).pop("tensors", None)

    def names(self) -> Iterator[str]:
        """The names of all modules but the model itself, then those of all tensors."""
        yield from filter(None, self.modules)
        for group in self.tensors:
            yield from group.names


def _walk(module: nn.Module, name: str, found: dict[str, nn.Module]) -> None:
    """Add `module` and all modules in it. A recursive closure would keep the model alive until it is collected."""
    found[name] = module
    prefix = f"{name}." if name else ""
    for leaf, child in module._modules.items():
        if child is not None:
            _walk(child, prefix + leaf, found)


def find_owner(modules: Mapping[str, nn.Module], name: str) -> tuple[nn.Module, str]:
    """(module, leaf) of the parameter, buffer or child module called `name` in a model with these modules."""
    path, _, leaf = name.rpartition(".")
    return modules[path], leaf


def tensor_key(tensor: Tensor) -> tuple[object, ...]:
    """A key that all names of a tensor share, also on meta, where `init_empty_weights` makes new Parameters.

    That of a tensor without one storage and one shape, such as a sparse or nested one, is that of the object.
    """
    try:
        return tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    except RuntimeError:
        return (id(tensor),)


def is_dense(tensor: Tensor) -> bool:
    """Whether the numbers of `tensor` lie in one memory, as strides say: not if it is sparse, mkldnn or nested."""
    return tensor.layout is torch.strided and not tensor.is_nested


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of `tensor`; of a nested one, whose members differ in theirs, the number of its elements."""
    return torch.Size([tensor.numel()]) if tensor.is_nested else tensor.shape


def nbytes_of(tensor: Tensor) -> int:
    """The bytes of the numbers of `tensor`, and of their indices if it is sparse."""
    if tensor.layout is torch.sparse_coo:
        parts: tuple[Tensor, ...] = sparse_parts(tensor)
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = tensor.crow_indices(), tensor.col_indices(), tensor.values()
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    else:
        parts = (tensor,)
    return sum(part.numel() * part.element_size() for part in parts)


def tensor_table(module: nn.Module, leaf: str) -> dict[str, Any]:
    """The dict in which `module` holds its parameter or buffer `leaf`.

    If `module` is a ScriptModule, `leaf` may also be the path of a tensor of a ScriptModule inside of it.
    """
    if "." in leaf:
        return cast(dict[str, Any], _ScriptedTensors(module))  # torch declares these as dicts too
    return module._parameters if leaf in module._parameters else module._buffers


def held_tensor(modules: Mapping[str, nn.Module], name: str) -> Tensor:
    """The parameter or buffer called `name` in a model with these modules, whatever reading the attribute gives.

    A property or a `__getattr__` of the module's class may make another tensor of it.
    """
    module, leaf = find_owner(modules, name)
    return cast(Tensor, tensor_table(module, leaf)[leaf])


def assign_tensor(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter or buffer `leaf` of `module`.

    setattr alone does not do it, because `init_empty_weights` patches what it calls. An RNN keeps a second list of its
    weights, which only setattr updates.
    """
    if isinstance(module, nn.RNNBase):
        setattr(module, leaf, tensor)
    tensor_table(module, leaf)[leaf] = tensor


class _ScriptedTensors:
    """The tensors of the ScriptModules in `module` by their paths; none of them survives a deepcopy but `module`."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getitem__(self, path: str) -> Tensor:
        table, leaf = self._find(path)
        tensor: Tensor = table[leaf]
        return tensor

    def __setitem__(self, path: str, tensor: Tensor) -> None:
        table, leaf = self._find(path)
        table[leaf] = tensor

    def _find(self, path: str) -> tuple[dict[str, Any], str]:
        module, (*names, leaf) = self._module, path.split(".")
        for name in names:  # get_submodule refuses a ScriptModule
            module = module._modules[name]  # type: ignore[assignment]
        return tensor_table(module, leaf), leaf


def is_called(module: nn.Module) -> bool:
    """Whether a hook can surround the forward of the module.

    A ModuleList, a ModuleDict or a ParameterList has no forward, and that of a ScriptModule cannot be replaced.
    """
    return not isinstance(module, torch.jit.ScriptModule) and type(module).forward is not nn.Module.forward


def is_stack(module: nn.Module) -> bool:
    """Whether the members of the module are blocks: it has a list of modules, or is a Sequential of composite ones."""
    if isinstance(module, nn.Sequential):
        return any(any(True for _ in child.children()) for child in module.children())
    return any(isinstance(child, (nn.ModuleList, nn.ModuleDict)) and len(child) for child in module.children())
