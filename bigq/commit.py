"""commit: the only code that changes a model; everything before it works on the side."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from bigq.linear import QuantizedLinear
from bigq.model_tensors import assign_tensor, find_owner, tensor_key
from bigq.plan import Job, PlannedLinear, PlannedTensor

__all__ = ["commit", "restored_on_error"]


@contextmanager
def restored_on_error(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Give `modules` back the class, attributes and tensors that they had if the block raises, Ctrl-C included."""
    before = [(module, module.__class__, _copy_of(vars(module))) for module in modules.values()]
    try:
        yield
    except BaseException:
        for module, kind, attributes in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
        raise


def _copy_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a module, with lists and dicts of their own for what a commit changes in place."""
    copy = {**attributes, "_parameters": {**attributes["_parameters"]}, "_buffers": {**attributes["_buffers"]}}
    if "_flat_weights" in attributes:
        copy["_flat_weights"] = [*attributes["_flat_weights"]]
    return copy


def commit(modules: Mapping[str, nn.Module], job: Job, tensors: Mapping[str, Tensor], *, frozen: bool = False) -> None:
    """Carry out `job` with its finished tensors, {leaf name: tensor}, under every name it has in a model.

    `modules` are those of the model by name. `frozen` takes requires_grad from a parameter: an offloaded one is lent as
    a copy, which no gradient would reach.
    """
    if isinstance(job, PlannedLinear):
        _commit_linear(modules, job, tensors)
    else:
        (tensor,) = tensors.values()
        _commit_tensor(modules, job, tensor, frozen)


def _commit_linear(modules: Mapping[str, nn.Module], linear: PlannedLinear, state: Mapping[str, Tensor]) -> None:
    QuantizedLinear.convert(modules[linear.names[0]], linear.description, state)
    for name in linear.names:
        parent = modules[name.rpartition(".")[0]]
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # turns off its fused inference path, which reads linear1.weight


def _commit_tensor(modules: Mapping[str, nn.Module], planned: PlannedTensor, tensor: Tensor, frozen: bool) -> None:
    requires_grad = planned.requires_grad and not frozen
    value = getattr(*find_owner(modules, planned.names[0]))
    if value is not None and tensor_key(value) == tensor_key(tensor) and value.device == tensor.device:
        value.requires_grad_(requires_grad)  # where nothing moved, the object stays: an optimizer may hold it
    else:
        value = tensor if planned.is_buffer else nn.Parameter(tensor, requires_grad=requires_grad)
    for name in planned.names:
        assign_tensor(*find_owner(modules, name), value)
