"""stack_gradients: the backward pass of the products with a stack of weights, each row by its own.

dX = dY @ W of the same rows. In 4 bits W is decoded by the op that multiplies, and never dequantized as a whole where
the op does not choose to.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bigq.ops.library import (
    LIBRARY,
    dequantize_int8,
    grouped_linear_4bit,
    grouped_linear_4bit_backward,
    grouped_linear_int8_backward,
    grouped_matmul,
)
from bigq.ops.routes import order_by_weight, weights_of_rows
from bigq.ops.sharding import shard_width

__all__ = ["stack_gradients"]


def _save_stack_4bit(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """For the grouped and the routed product, whose second input says which weight multiplies which row."""
    x, route, weight, absmax, bias, nested_absmax, nested_offset, quant_type, block_size, *_ = inputs
    ctx.rows, in_features = x.shape
    ctx.settings, ctx.inputs = (quant_type, block_size, in_features), len(inputs)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(route, weight, absmax, nested_absmax, nested_offset)


def _save_stack_int8(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, route, weight, absmax, bias, _ = inputs
    ctx.rows, ctx.settings, ctx.inputs = x.shape[0], (), len(inputs)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(route, weight, absmax)


def _stack_backward(ctx: Any, grad: Tensor, *, sorted_rows: bool) -> tuple[Tensor | None, ...]:
    grad_x, grad_bias = stack_gradients(
        grad,
        ctx.saved_tensors,
        ctx.settings,
        x_rows=ctx.rows if ctx.needs_input_grad[0] else None,
        bias_dtype=ctx.bias_dtype if ctx.needs_input_grad[4] else None,
        sorted_rows=sorted_rows,
    )
    return grad_x, None, None, None, grad_bias, *[None] * (ctx.inputs - 5)


def stack_gradients(
    grad: Tensor,
    tensors: Sequence[Tensor],
    settings: tuple[Any, ...],
    *,
    x_rows: int | None,
    bias_dtype: torch.dtype | None,
    sorted_rows: bool,
    multiply: Callable[..., Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x [M, K] and of the bias [E, N] of a product with a stack, from that of its output [S, N].

    dX = dY @ dequantize(weight), each row by its weight, summed over the rows that read one row of x.

    Args:
        grad: of the output.
        tensors: the route, the codes [E, N, ...], the scales, and the two tensors that scales are decoded with or None.
        settings: those of `dequantized`, which int8 has none of.
        x_rows: M; None if x needs no gradient.
        bias_dtype: of the bias; None if it needs no gradient.
        sorted_rows: whether the product is the grouped one, whose route says where the rows of each weight end.
        multiply: computes dY @ W of sorted rows from (dY, stops, the other tensors, settings), in place of the ops.
    """
    route, packed = tensors[:2]
    (weights, n), grad_x, grad_bias = packed.shape[:2], None, None
    if x_rows is not None:
        order, stops = (None, route) if sorted_rows else order_by_weight(route, weights)
        grad_x = (multiply or _times_stack)(grad if order is None else grad[order], stops, tensors[1:], settings)
        if order is not None:
            each = torch.empty_like(grad_x).index_copy(0, order, grad_x)
            grad_x = each.view(x_rows, len(route) // max(x_rows, 1), each.shape[1]).sum(dim=1)
    if bias_dtype is not None:
        if sorted_rows:
            ids = weights_of_rows(route, len(grad))
        else:
            ids = torch.where((route >= 0) & (route < weights), route, weights)
        total = torch.zeros(weights + 1, n, dtype=torch.float32, device=grad.device)
        grad_bias = total.index_add(0, ids, grad.float())[:weights].to(bias_dtype)
    return grad_x, grad_bias


def _times_stack(grad: Tensor, stops: Tensor, tensors: Sequence[Tensor], settings: tuple[Any, ...]) -> Tensor:
    """dY [S, N] @ W [E, N, K], each row by its weight: [S, K]."""
    packed, absmax, *nested = tensors
    if not settings:
        return grouped_linear_int8_backward(grad, stops, packed, absmax)  # type: ignore[no-any-return]
    quant_type, block_size, in_features = settings
    scales = (absmax, *(nested or (None, None)))
    width = shard_width(packed, in_features)
    return grouped_linear_4bit_backward(grad, stops, packed, *scales, quant_type, block_size, width)  # type: ignore[no-any-return]


def _save_grouped_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, stops, weight, absmax, nested_absmax, nested_offset, *ctx.settings = inputs
    ctx.save_for_backward(stops, weight, absmax, nested_absmax, nested_offset)


def _grouped_backward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The product of which this op computes the gradient is linear, so it is the gradient of this one."""
    stops, weight, absmax, *nested = ctx.saved_tensors
    out = None
    if ctx.needs_input_grad[0]:
        out = grouped_linear_4bit(grad, stops, weight, absmax, None, *nested, *ctx.settings)
    return out, *[None] * 8


def _save_grouped_backward_int8(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _grouped_backward_backward_int8(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """grad times the transposed weights, in the dtype of grad: the gradient of rounding x to int8 is 1."""
    stops, weight, absmax = ctx.saved_tensors
    out = None
    if ctx.needs_input_grad[0]:
        dense = dequantize_int8(weight.flatten(0, 1), absmax.flatten(0, 1), grad.dtype).view(weight.shape)
        out = grouped_matmul(grad, stops, dense.mT)
    return out, None, None, None


def _save_grouped_matmul(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _grouped_matmul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dX = dY @ dense, each row by its weight. The weight is made of a frozen one and has no gradient."""
    stops, dense = ctx.saved_tensors
    return grouped_matmul(grad, stops, dense.mT) if ctx.needs_input_grad[0] else None, None, None


for _kind in ("grouped", "routed"):
    _backward = partial(_stack_backward, sorted_rows=_kind == "grouped")
    for _bits, _save in (("4bit", _save_stack_4bit), ("int8", _save_stack_int8)):
        _name = f"bigq::{_kind}_linear_{_bits}"
        torch.library.register_autograd(_name, _backward, setup_context=_save, lib=LIBRARY)
torch.library.register_autograd(
    "bigq::grouped_linear_4bit_backward",
    _grouped_backward_backward,
    setup_context=_save_grouped_backward,
    lib=LIBRARY,
)
torch.library.register_autograd(
    "bigq::grouped_linear_int8_backward",
    _grouped_backward_backward_int8,
    setup_context=_save_grouped_backward_int8,
    lib=LIBRARY,
)
torch.library.register_autograd(
    "bigq::grouped_matmul", _grouped_matmul_backward, setup_context=_save_grouped_matmul, lib=LIBRARY
)
