"""commit: put what a load made into a model."""

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from bigq.formats import QUANT_STATE, state_name
from bigq.model.tree import assign_tensor, find_owner, held_tensor, tensor_key
from bigq.planning.plan import PlannedTensor, PlannedWeight
from bigq.weight.convert import convert

__all__ = ["commit_tensor", "commit_weight"]


def commit_weight(modules: Mapping[str, nn.Module], weight: PlannedWeight, tensors: Mapping[str, Tensor]) -> None:
    """Make every module that holds `weight` a quantized one.

    Args:
        modules: those of the model, by name.
        weight: what is planned for it.
        tensors: its finished tensors, each by its first name, as far as they are known yet. They are not copied.
    """
    parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    parts = {part: parameters.get(weight.tensor_name(part)) for part in weight.description.state_spec}
    for ref in weight.refs:
        state = {state_name(ref.leaf, part): parameter for part, parameter in parts.items()}
        if ref.described:
            state[QUANT_STATE] = parameters.get(ref.quant_states[0])
        convert(modules[ref.owners[0]], ref.leaf, weight.description, state)


def commit_tensor(modules: Mapping[str, nn.Module], planned: PlannedTensor, tensor: Tensor, *, frozen: bool) -> None:
    """Make the finished `tensor` the parameter or buffer of every name of `planned`.

    `frozen` takes requires_grad from a parameter: an offloaded one computes as a copy, so no gradient would reach it.
    """
    requires_grad = planned.requires_grad and not frozen
    value = held_tensor(modules, planned.names[0])
    if value is not None and tensor_key(value) == tensor_key(tensor) and value.device == tensor.device:
        if value.requires_grad != requires_grad:  # torch refuses to set it on what was made in inference mode
            value.requires_grad_(requires_grad)
        # where nothing moved, the object stays: an optimizer may hold it
    else:
        value = tensor if planned.is_buffer else _parameter(value, tensor, requires_grad)
    for name in planned.names:
        assign_tensor(*find_owner(modules, name), value)


def _parameter(old: Tensor | None, tensor: Tensor, requires_grad: bool) -> nn.Parameter:
    """A Parameter of `tensor`, of the class and with the attributes of `old`."""
    if not isinstance(old, nn.Parameter) or (type(old) is nn.Parameter and not vars(old)):
        return nn.Parameter(tensor, requires_grad=requires_grad)
    new = cast(nn.Parameter, tensor.detach().as_subclass(type(old)).requires_grad_(requires_grad))
    vars(new).update(vars(old))
    return new
