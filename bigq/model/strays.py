"""strays: tensors that modules keep as plain attributes, which no load fills and nothing registers."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from bigq.errors import UnsupportedError
from bigq.model.tree import ModelTree, tensor_name
from bigq.system.internals import has_forward_pre_hooks
from bigq.system.text import shortlist

__all__ = ["refuse_strays"]

_OF_EVERY_MODULE = vars(nn.Module()).keys()
_NO_TENSORS = {int, float, bool, str, type(None)}  # most attributes of 9,500 linears


def refuse_strays(tree: ModelTree, quantized: set[str], *, in_place: bool) -> None:
    """Raise an UnsupportedError if a module keeps a tensor, also in a list or dict, that a load would leave behind.

    That is one on meta which is no parameter or buffer, and a weight that becomes a quantized one. One of a model that
    holds its weights keeps the numbers of the weight, so it is left alone.

    Args:
        tree: the model before it is loaded.
        quantized: names of the weights to quantize.
    """
    kept = [(module, *found) for module in tree.aliases for found in _kept(module)]
    if not kept:
        return
    registered: dict[int, str] = {}
    for path, module in tree.modules.items():
        for table in (module._parameters, module._buffers):
            registered |= {id(t): tensor_name(path, leaf) for leaf, t in table.items() if t is not None}
    meta, replaced = [], []
    for module, attribute, tensor in kept:
        where, name = tensor_name(tree.aliases[module][0], attribute), registered.get(id(tensor))
        if name in quantized:
            replaced += [] if in_place else [f"{where}, which is {name}"]
        elif name is None and tensor.is_meta and not _is_computed(module, attribute):
            meta.append(where)
    if meta:
        raise UnsupportedError(
            f"{len(meta)} tensors on meta are no parameters or buffers, so nothing fills them: {shortlist(meta)}; "
            "build the model with accelerate's init_empty_weights, or register them as buffers"
        )
    if replaced:
        raise UnsupportedError(
            f"{len(replaced)} weights to quantize are also kept as plain attributes, which would stay as they are: "
            f"{shortlist(replaced)}; add them to skip_modules"
        )


def _kept(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of the tensors in plain attributes of `module`."""
    own = vars(module)
    for name in own.keys() - _OF_EVERY_MODULE:
        if type(own[name]) not in _NO_TENSORS and not (name == "_flat_weights" and isinstance(module, nn.RNNBase)):
            yield from _inside(name, own[name], 4)


def _inside(path: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif depth and isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _inside(f"{path}[{index}]", item, depth - 1)
    elif depth and isinstance(value, Mapping):
        for key, item in value.items():
            yield from _inside(f"{path}[{key!r}]", item, depth - 1)


def _is_computed(module: nn.Module, attribute: str) -> bool:
    """Whether a hook computes the attribute before each call, of parameters whose names begin with its own.

    So do torch's old weight_norm and spectral_norm, and its pruning.
    """
    return has_forward_pre_hooks(module) and any(name.startswith(f"{attribute}_") for name in module._parameters)
