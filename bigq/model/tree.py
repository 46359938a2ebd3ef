"""A model's own modules and tensors: each under all of its names, and read as a checkpoint's are."""

from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from bigq.checkpoint import StoredTensor, refuse_unknown
from bigq.errors import CheckpointError

__all__ = [
    "ModelTensors",
    "ModelTree",
    "TensorGroup",
    "assign_tensor",
    "find_owner",
    "tensor_key",
    "tensor_name",
    "tensor_table",
]


class TensorGroup(NamedTuple):
    """One parameter or buffer of a model: several names are ties, or a module that is reached on several paths."""

    names: tuple[str, ...]
    tensor: Tensor
    is_buffer: bool
    persistent: bool


def tensor_name(module_name: str, leaf: str) -> str:
    """The name in the model of the tensor `leaf` of a module; the model itself has the name ""."""
    return f"{module_name}.{leaf}" if module_name else leaf


class ModelTree:
    """The modules and tensors of `model` by all of their names; walked once, so it holds until the model changes.

    It keeps the tensors alive: drop it before they are replaced one by one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every module under each of its names, the model itself first, as "".

        As `named_modules(remove_duplicate=False)` has it, without a generator for each level: a third of the time.
        """
        found: dict[str, nn.Module] = {}
        _walk(self.model, "", found)
        return found

    @cached_property
    def aliases(self) -> dict[nn.Module, tuple[str, ...]]:
        """Every module once with all of its names, the model itself first."""
        names: dict[nn.Module, list[str]] = {}
        for name, module in self.modules.items():
            names.setdefault(module, []).append(name)
        return {module: tuple(aliases) for module, aliases in names.items()}

    @cached_property
    def tensors(self) -> list[TensorGroup]:
        """Every parameter and buffer once, in module order."""
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

    def names(self) -> Iterator[str]:
        """The names of all modules but the model itself, then those of all tensors."""
        yield from filter(None, self.modules)
        for group in self.tensors:
            yield from group.names


def _walk(module: nn.Module, name: str, found: dict[str, nn.Module]) -> None:
    """Note `module` and all in it by name. No closure: one that calls itself keeps the model until it is collected."""
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
    """Equal for two names of one tensor, also on meta, where `init_empty_weights` re-wraps a tied Parameter."""
    return tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()


def tensor_table(module: nn.Module, leaf: str) -> dict[str, Any]:
    """The dict in which `module` itself holds its parameter or buffer `leaf`.

    Of a ScriptModule, `leaf` may be the path of a tensor of a ScriptModule in it.
    """
    if "." in leaf:
        return cast(dict[str, Any], _ScriptedTensors(module))  # torch declares those of a ScriptModule as dicts too
    return module._parameters if leaf in module._parameters else module._buffers


def assign_tensor(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter or buffer `leaf` of `module`.

    Not by setattr alone: `init_empty_weights` patches what that calls. An RNN keeps a second list of its weights, which
    only setattr knows.
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


class ModelTensors:
    """The persistent parameters and buffers of a model, each once under its first name, in module order; a Source."""

    in_place = True

    def __init__(self, model: nn.Module) -> None:
        tree = ModelTree(model)
        self._modules = tree.modules
        self._kind = type(model).__name__
        self.tensors = {
            group.names[0]: StoredTensor(
                name=group.names[0],
                shape=group.tensor.shape,
                dtype=group.tensor.dtype,
                where=f"<{self._kind}>",
            )
            for group in tree.tensors
            if group.persistent
        }

    def check(self) -> None:
        """Raise a CheckpointError if a tensor holds no numbers."""
        empty = [name for name in self.tensors if self._tensor(name).is_meta]
        if empty:
            raise CheckpointError(
                f"{len(empty)} tensors of {self._kind} are on meta, {empty[0]} among them: "
                "pass weights_location, the checkpoint to fill them from"
            )

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) in module order; the tensor is the model's own, not a copy."""
        refuse_unknown(names, self.tensors, self._kind)
        wanted = set(names)
        return ((name, self._tensor(name).detach()) for name in self.tensors if name in wanted)

    def _tensor(self, name: str) -> Tensor:
        tensor: Tensor = getattr(*find_owner(self._modules, name))
        return tensor
