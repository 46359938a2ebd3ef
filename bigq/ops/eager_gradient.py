"""The eager call of a linear whose input needs a gradient: one node of autograd around the launcher, or its replay.

torch.library's node for an op took 271 us of host time a call in the forward pass and 262 in the backward pass (H200,
with a profiler on), and a step of QLoRA is bound by the host. This node does the same: the packed weight is frozen, and
dX is dY times the dequantized weight.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigq.ops import library
from bigq.ops.kept import keep
from bigq.ops.replays import Settings, State, run
from bigq.ops.stack_gradients import stack_gradients
from bigq.system.internals import as_result, something_listens

__all__ = ["input_gradient", "linear_with_gradient", "routed_with_gradient"]


def linear_with_gradient(name: str, x: Tensor, state: State, settings: Settings) -> Tensor:
    """The op `name` of x [..., K] on a GPU, as `eager.linear` calls it; gradients reach x and the bias."""
    return _Linear.apply(x, state[2], name, state, settings)  # type: ignore[no-any-return, no-untyped-call]


def routed_with_gradient(name: str, x: Tensor, route: Tensor, state: State, settings: Settings) -> Tensor:
    """The op `name` of x [M, K] and a stack on a GPU, as `eager.routed` calls it; gradients reach x and the bias."""
    return _Stack.apply(x, state[2], name, route, state, settings)  # type: ignore[no-any-return, no-untyped-call]


def input_gradient(name: str, grad: Tensor, weight: Sequence[Tensor], settings: Settings, in_features: int) -> Tensor:
    """The gradient of x [..., K] of the linear op `name`: that of its output, `grad` [..., N], times the weight [N, K].

    Args:
        name: of the op.
        grad: of the output; the result has its dtype.
        weight: codes, scales and what else the op takes but the bias.
        settings: the op's other arguments.
        in_features: K.
    """
    packed, absmax, *nested = weight
    settings = settings if name == "linear_int8" else (*settings[:-1], in_features)
    if _is_plain(grad):
        state = (packed, absmax, None, *nested)
        return run(library.cuda_implementation, f"{name}_backward", grad, state, settings)
    return grad @ library.dequantized(name, packed, absmax, nested, settings, grad.dtype)


class _Linear(torch.autograd.Function):
    """The third of `state` is the bias, which is passed on its own as well: autograd sees no tensor in a tuple."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, name: str, state: State, settings: Settings) -> Tensor:
        ctx.name, ctx.settings, ctx.in_features = name, settings, x.shape[-1]
        ctx.bias_dtype = None if bias is None else bias.dtype
        weight = (*state[:2], *state[3:])
        ctx.kept = keep(weight)
        if ctx.kept is None:
            ctx.save_for_backward(*weight)
        return as_result(run(library.cuda_implementation, name, x, state, settings))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = ctx.saved_tensors if ctx.kept is None else ctx.kept.parameters()
            grad_x = input_gradient(ctx.name, grad, weight, ctx.settings, ctx.in_features)
        if ctx.needs_input_grad[1]:
            grad_bias = library.bias_grad(grad, ctx.bias_dtype)
        return grad_x, grad_bias, None, None, None


class _Stack(torch.autograd.Function):
    """The third of `state` is the bias, as in `_Linear`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, name: str, route: Tensor, state: State, settings: Settings
    ) -> Tensor:
        quant_type = next((i for i, setting in enumerate(settings) if isinstance(setting, str)), None)
        ctx.settings = () if quant_type is None else (*settings[quant_type : quant_type + 2], x.shape[-1])
        ctx.rows, ctx.sorted_rows = len(x), name.startswith("grouped")
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(route, *state[:2], *state[3:])
        return as_result(run(library.cuda_implementation, name, x, state, settings, (route,)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = stack_gradients(
            grad,
            ctx.saved_tensors,
            ctx.settings,
            x_rows=ctx.rows if ctx.needs_input_grad[0] else None,
            bias_dtype=ctx.bias_dtype if ctx.needs_input_grad[1] else None,
            sorted_rows=ctx.sorted_rows,
            multiply=_times_stack if _is_plain(grad) else None,
        )
        return *gradients, None, None, None, None


def _is_plain(grad: Tensor) -> bool:
    """Whether a launcher can take a gradient: one in the memory of a GPU, whose own gradient nobody asks for."""
    if type(grad) is not Tensor or not grad.is_cuda or torch.is_grad_enabled() or something_listens():
        return False
    try:
        grad.data_ptr()
    except RuntimeError:  # a batch of gradients (is_grads_batched) looks like a tensor, and has no memory
        return False
    return True


def _times_stack(grad: Tensor, stops: Tensor, tensors: Sequence[Tensor], settings: Settings) -> Tensor:
    packed, absmax, *nested = tensors
    if not settings:
        return library.cuda_implementation("grouped_linear_int8_backward")(grad, stops, packed, absmax)  # type: ignore[no-any-return]
    state = (packed, absmax, *(nested or (None, None)))
    return run(library.cuda_implementation, "grouped_linear_4bit_backward", grad, state, settings, (stops,))
