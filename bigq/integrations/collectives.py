"""collectives: what the processes of tensor and expert parallelism add up, forward and backward."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

__all__ = ["Group", "local_result", "placed", "summed", "with_summed_gradients"]

Group = dist.ProcessGroup


def placed(x: Tensor, mesh: DeviceMesh, have: Placement, want: Placement, size: int) -> DTensor:
    """`x` as a DTensor in the layout `want`; `have` is that of a plain tensor whose last dimension is `size` in all."""
    if not isinstance(x, DTensor):
        shape = torch.Size((*x.shape[:-1], size))
        by_features = have in (Shard(-1), Shard(x.dim() - 1))  # the last process may have fewer
        whole = {"shape": shape, "stride": torch.empty(shape, device="meta").stride()} if by_features else {}
        x = DTensor.from_local(x, mesh, [have], run_check=False, **whole)  # type: ignore[arg-type]
    return x.redistribute(placements=[want])


def local_result(x: Tensor) -> Tensor:
    """What this process has of the DTensor `x`, the output of a module, which the code behind it may overwrite.

    Autograd takes what a DTensor gives for a view of its own, and refuses a write to that.
    """
    local: Tensor = x.to_local()  # type: ignore[attr-defined]
    return local.clone() if local.requires_grad else local


class _SumOfGradients(torch.autograd.Function):
    """One node for all inputs of a module, so that every process sums their gradients in one order."""

    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(
            _reduced(grad.clone(), ctx.group) if needed else None
            for grad, needed in zip(grads, ctx.needs_input_grad[1:], strict=True)
        )


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, *entered: Tensor) -> Tensor:
        ctx.save_for_backward(*entered)
        return _reduced(x.clone(), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, *(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


def with_summed_gradients(group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`tensors`, which all processes have; the gradient of each is the sum of theirs."""
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return tensors
    return _SumOfGradients.apply(group, *tensors)  # type: ignore[no-any-return, no-untyped-call]


def summed(x: Tensor, group: Group, *entered: Tensor) -> Tensor:
    """The sum of the processes' `x`, which is a new tensor and may be overwritten; all have its gradient.

    `entered` are results of `with_summed_gradients` that `x` may not depend on in a process that has none of the
    experts that tokens go to. The others would wait for its gradients.
    """
    if torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for tensor in entered)):
        return _Sum.apply(x, group, *entered)  # type: ignore[no-any-return, no-untyped-call]
    return _reduced(x, group)


def _reduced(x: Tensor, group: Group) -> Tensor:
    x = x.contiguous()
    dist.all_reduce(x, group=group)
    return x
