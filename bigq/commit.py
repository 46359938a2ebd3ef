"""commit: the only code that changes a model; everything before it works on the side."""

from collections.abc import Mapping

from torch import Tensor, nn

from bigq.linear import QuantizedLinear
from bigq.model_tensors import assign_tensor, find_owner, tensor_key
from bigq.plan import PlannedLinear, PlannedTensor

__all__ = ["commit"]


def commit(
    model: nn.Module, job: PlannedLinear | PlannedTensor, tensors: Mapping[str, Tensor], *, frozen: bool = False
) -> None:
    """Carry out `job` with its finished tensors, {leaf name: tensor}, under every name it has in `model`.

    `frozen` takes requires_grad from a parameter: an offloaded one is lent as a copy, which no gradient would reach.
    """
    if isinstance(job, PlannedLinear):
        _commit_linear(model, job, tensors)
    else:
        (tensor,) = tensors.values()
        _commit_tensor(model, job, tensor, frozen)


def _commit_linear(model: nn.Module, linear: PlannedLinear, state: Mapping[str, Tensor]) -> None:
    QuantizedLinear.convert(model.get_submodule(linear.names[0]), linear.description, state)
    for name in linear.names:
        parent, _ = find_owner(model, name)
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # turns off its fused inference path, which reads linear1.weight


def _commit_tensor(model: nn.Module, planned: PlannedTensor, tensor: Tensor, frozen: bool) -> None:
    requires_grad = planned.requires_grad and not frozen
    value = getattr(*find_owner(model, planned.names[0]))
    if value is not None and tensor_key(value) == tensor_key(tensor) and value.device == tensor.device:
        value.requires_grad_(requires_grad)  # where nothing moved, the object stays: an optimizer may hold it
    else:
        value = tensor if planned.is_buffer else nn.Parameter(tensor, requires_grad=requires_grad)
    for name in planned.names:
        assign_tensor(*find_owner(model, name), value)
