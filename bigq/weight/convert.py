"""convert: turn a module into a QuantizedModule by replacing its class and its Parameters."""

from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import nn

from bigq.formats import QUANT_STATE, Description, state_name
from bigq.system.internals import FSDP_SHARDS_INTEGERS, let_fsdp_shard_integers
from bigq.weight.experts import QuantizedExperts, are_fused_experts
from bigq.weight.linear import QuantizedConv1D, QuantizedEmbedding, QuantizedLinear, QuantizedMatrix
from bigq.weight.own_attributes import is_read_as_held, name_in_use, names_added
from bigq.weight.quantized_module import QuantizedModule, weight_property

__all__ = ["convert", "is_transposed_linear", "original_class", "revert"]

_OF_MATRICES = names_added(QuantizedMatrix)


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether `module` is transformers' GPT-2 Conv1D, a linear that stores its weight as [K, N]."""
    return _is_conv1d(type(module))


def convert(module: nn.Module, leaf: str, description: Description, state: Mapping[str, nn.Parameter | None]) -> None:
    """Make the Parameter `leaf` of `module` a quantized weight.

    The module object stays the same, so everything that refers to it sees the change: a second parent, a closure, its
    hooks. Its class becomes a subclass of its own class: `QuantizedLinear` for an nn.Linear.

    Args:
        module: is changed.
        leaf: name of a Parameter of it.
        description: of the quantized weight.
        state: the parts of the weight and the module's quant_state, by the name of the Parameter. Parts that are not
            known yet may be left out.
    """
    if not FSDP_SHARDS_INTEGERS:
        let_fsdp_shard_integers()
    names = [state_name(leaf, part) for part in description.state_spec]
    if QUANT_STATE not in module._parameters:
        names.append(QUANT_STATE)
    parameters: dict[str, nn.Parameter | None] = {}
    for name, parameter in module._parameters.items():
        if name == leaf:  # the parts get the position of the weight
            parameters.update((new, state.get(new)) for new in names)
        else:
            parameters[name] = parameter
    if state.get(QUANT_STATE) is not None:  # it belongs to the module and may come with any of its weights
        parameters[QUANT_STATE] = state[QUANT_STATE]
    plain_kind, leaves, reads = _made_for(type(module))
    reads = reads if leaves else _has_to_read(module)
    kind = quantized_class(plain_kind, (*leaves, leaf), reads)  # type: ignore[arg-type]
    # nn.Module's own setattr takes 3 us, and a model may have 19,000 linears.
    object.__setattr__(module, "__class__", kind)
    vars(module)["_parameters"] = parameters
    module._describe(leaf, description)  # type: ignore[operator]


def revert(module: QuantizedModule, weights: dict[int, nn.Parameter]) -> None:
    """Make `module` the module that `convert` was given, with Parameters on meta in place of its quantized weights.

    Args:
        module: changed.
        weights: the Parameters that other modules got, by the id of what they stand for, so that ties stay; added to.
    """
    parameters: dict[str, nn.Parameter | None] = {}
    for name, parameter in module._parameters.items():
        leaf = module.weight_of(name)
        if leaf == name:
            parameters[name] = parameter
        elif name != QUANT_STATE and leaf not in parameters:
            description = module.descriptions[leaf]
            weight = nn.Parameter(torch.empty(description.weight_shape, dtype=description.dtype, device="meta"))
            parameters[leaf] = weights.setdefault(id(module._parameters[state_name(leaf, "packed")]), weight)
    kind = original_class(module)
    module._forget()
    object.__setattr__(module, "__class__", kind)
    vars(module)["_parameters"] = parameters


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that `module` had before `convert` changed it; its class if `convert` did not."""
    return _made_for(type(module))[0]


def _made_for(kind: type[nn.Module]) -> tuple[type[nn.Module], tuple[str, ...], bool]:
    """The arguments of the `quantized_class` call that made `kind`; (kind, (), False) if none did."""
    if kind is QuantizedLinear:
        return nn.Linear, ("weight",), False
    made_for: tuple[type[nn.Module], tuple[str, ...], bool] = getattr(kind, "_made_for", (kind, (), False))
    return made_for


@cache
def quantized_class(kind: type[nn.Module], leaves: tuple[str, ...], reads: bool = False) -> type[QuantizedModule]:
    """Make the subclass of `kind` whose Parameters `leaves` are quantized.

    If `kind` is a linear, a Conv1D, an embedding or fused experts with the forward of torch or transformers, the class
    uses the kernels. Any other forward is kept, and reads each weight as a QuantizedWeight; so is that of a linear or
    Conv1D with `reads`.
    """
    experts = QuantizedExperts if are_fused_experts(kind) else QuantizedModule
    base = _base(kind) if "weight" in leaves else experts
    if reads and issubclass(base, QuantizedMatrix):
        base = QuantizedModule
    if (base, kind, leaves) == (QuantizedLinear, nn.Linear, ("weight",)):
        return QuantizedLinear
    namespace: dict[str, Any] = {leaf: weight_property(leaf) for leaf in leaves}
    namespace |= {"_made_for": (kind, leaves, reads), "__reduce_ex__": _reduce, "__module__": kind.__module__}
    return type(f"Quantized{kind.__name__}", (base, kind), namespace)


def _base(kind: type[nn.Module]) -> type[QuantizedModule]:
    if issubclass(kind, nn.Linear) and kind.forward is nn.Linear.forward:
        return QuantizedLinear
    if issubclass(kind, nn.Embedding) and kind.forward is nn.Embedding.forward:
        return QuantizedEmbedding
    return QuantizedConv1D if _is_conv1d(kind) else QuantizedModule


def _has_to_read(module: nn.Module) -> bool:
    """Whether a linear `module` can be no QuantizedMatrix, which has names of its own and takes the bias as it is held.

    Its forward stays then, and reads the weight.
    """
    return not is_read_as_held(module, "bias") or name_in_use(module, _OF_MATRICES) is not None


def _is_conv1d(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__.partition(".")[0] == "transformers"


def _reduce(module: QuantizedModule, protocol: Any) -> tuple[Any, ...]:
    """Let pickle and deepcopy make the class again: one that is made at run time cannot be found by its name."""
    _, _, *rest = cast(tuple[Any, ...], object.__reduce_ex__(module, protocol))
    return _make, _made_for(type(module)), *rest


def _make(kind: type[nn.Module], leaves: tuple[str, ...], reads: bool = False) -> QuantizedModule:
    return QuantizedModule.__new__(quantized_class(kind, leaves, reads))  # type: ignore[arg-type]
