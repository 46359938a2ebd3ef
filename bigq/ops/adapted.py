"""The product of a quantized weight and of an adapter of LoRA: one node of autograd for both.

y = x W^T + bias + scaling (x A^T) B^T. The adapter's products are added to those of the weight where they are written
(beta of a GEMM). So nothing of the size of x or y is read or written for a cast, a scaling or a sum alone: these are
16 % of the GPU's time in a step of QLoRA that computes them one by one (8B shape, 2048 tokens, H200).
"""

from typing import Any

import torch
from torch import Tensor

from bigq.errors import UnsupportedError
from bigq.ops import eager, library
from bigq.ops.eager_gradient import input_gradient
from bigq.ops.kept import keep
from bigq.ops.replays import Settings, State
from bigq.system.internals import as_result, copy_all, something_transforms

__all__ = ["adapted_linear"]


def adapted_linear(
    name: str,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scaling: float,
    dtype: torch.dtype,
    state: State,
    settings: Settings,
) -> Tensor:
    """The op `name` of x [..., K], plus `scaling` times x times both factors: [..., N], in `dtype`.

    Gradients reach x, the factors and the bias, each in its own dtype. Autocast is off, no transform of functorch is
    active, and nothing is traced.

    Args:
        name: of a linear op.
        x: activations, floating point.
        down: A [r, K], floating point, on the device of x.
        up: B [N, r], likewise.
        scaling: a factor.
        dtype: of what is multiplied. Sums are in float32, or in float64.
        state: the tensors of a quantized weight with the bias among them, as `eager.linear` takes them.
        settings: the op's other arguments.

    Raises:
        UnsupportedError: in the backward pass, if its graph is to be kept for gradients of gradients.
    """
    if torch.is_grad_enabled():  # where nothing needs a gradient, this makes no node
        return _Adapted.apply(x, down, up, state[2], scaling, dtype, name, state, settings)  # type: ignore[no-any-return, no-untyped-call]
    return _forward(x, down, up, scaling, dtype, name, state, settings)[0]


def _forward(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scaling: float,
    dtype: torch.dtype,
    name: str,
    state: State,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, x in `dtype`, and the memory of both factors in `dtype` and of scaling x A^T: see `_parts`."""
    x = x if x.dtype is dtype else x.to(dtype)
    out = eager.linear(name, x, state, settings)
    rows = x.reshape(-1, x.shape[-1])
    (rank, k), n, tokens = down.shape, up.shape[0], rows.shape[0]
    if _are_cast(down, up, dtype):
        # In each call: not all that writes to a Parameter changes its version, such as the optimizers of bitsandbytes.
        memory = rows.new_empty(rank * (k + n + tokens))
        own_down, own_up, inner = _parts(memory, rank, k, n)
        copy_all([own_down, own_up], [down, up])
    else:
        own_down, own_up = down, up
        memory = inner = rows.new_empty(tokens, rank)
    inner.addmm_(rows, own_down.t(), beta=0, alpha=scaling)
    out.view(tokens, n).addmm_(inner, own_up.t())
    return out, x, memory


def _are_cast(down: Tensor, up: Tensor, dtype: torch.dtype) -> bool:
    return down.dtype is not dtype or up.dtype is not dtype


def _parts(memory: Tensor, rank: int, k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """A [r, K], B [N, r] and scaling x A^T [M, r] in one piece of memory: autograd saves one tensor instead of three.

    Under gradient checkpointing each saved tensor takes about 25 us of host time in a step, as much as a product.
    """
    start = memory.storage_offset()
    tokens = memory.numel() // rank - k - n
    return (
        memory.as_strided((rank, k), (k, 1), start),
        memory.as_strided((n, rank), (rank, 1), start + rank * k),
        memory.as_strided((tokens, rank), (rank, 1), start + rank * (k + n)),
    )


class _Adapted(torch.autograd.Function):
    """The bias, the third of `state`, is passed on its own as well: autograd sees no tensor in a tuple."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        bias: Tensor | None,
        scaling: float,
        dtype: torch.dtype,
        name: str,
        state: State,
        settings: Settings,
    ) -> Tensor:
        ctx.name, ctx.settings, ctx.scaling, ctx.sizes = name, settings, scaling, (*down.shape, up.shape[0])
        ctx.dtypes = x.dtype, down.dtype, up.dtype, None if bias is None else bias.dtype
        out, x, memory = _forward(x, down, up, scaling, dtype, name, state, settings)
        ctx.are_cast = _are_cast(down, up, dtype)
        parameters = (*state[:2], *state[3:]) if ctx.are_cast else (*state[:2], *state[3:], down, up)
        ctx.kept = keep(parameters)
        ctx.save_for_backward(x, memory, *(parameters if ctx.kept is None else ()))
        return as_result(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "gradients of gradients (create_graph=True) are asked of a LoRA layer that fuse_lora has fused, which "
                "computes first gradients only: call unfuse_lora(model) before the forward pass"
            )
        device_type = "cuda" if grad.is_cuda else grad.device.type
        if torch.is_autocast_enabled(device_type):  # around backward(): it would cast some of the products
            with torch.autocast(device_type, enabled=False):
                return _gradients(ctx, grad)
        return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """What `_Adapted.backward` returns."""
    x, memory, *weight = ctx.saved_tensors
    weight = weight if ctx.kept is None else ctx.kept.parameters()
    if ctx.are_cast:
        down, up, inner = _parts(memory, *ctx.sizes)
    else:
        *weight, down, up = weight
        inner = memory
    x_dtype, down_dtype, up_dtype, bias_dtype = ctx.dtypes
    needs_x, needs_down, needs_up, needs_bias = ctx.needs_input_grad[:4]
    grad_x = grad_down = grad_up = grad_bias = None
    rows, k = grad.reshape(-1, grad.shape[-1]), x.shape[-1]
    if needs_x or needs_down:
        inner_grad = torch.addmm(inner, rows, up, beta=0, alpha=ctx.scaling)
    if needs_x:
        grad_x = input_gradient(ctx.name, grad, weight, ctx.settings, k)
        if grad_x.dtype is x_dtype:
            grad_x.view(-1, k).addmm_(inner_grad, down)
        else:  # a sum in the dtype of x, as it is where autograd adds the two
            grad_x = grad_x.to(x_dtype)
            grad_x.view(-1, k).add_(inner_grad @ down)
    if needs_down:
        grad_down = _product(inner_grad.t(), x.reshape(-1, k), down_dtype)
    if needs_up:
        grad_up = _product(rows.t(), inner, up_dtype)
    if needs_bias:
        grad_bias = library.bias_grad(grad, bias_dtype)
    return grad_x, grad_down, grad_up, grad_bias, None, None, None, None, None


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`. On a GPU sums in float32 are not rounded first, which also saves a kernel."""
    if left.is_cuda and dtype is torch.float32 and left.dtype is not dtype and not something_transforms():
        return torch.mm(left, right, out_dtype=dtype)
    product = left @ right
    return product if product.dtype is dtype else product.to(dtype)
