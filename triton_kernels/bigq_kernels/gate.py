"""The gates of fused experts between their two products, and the gradients: one kernel each, in float32, rounded once.

- "silu": x [S, 2 * WIDTH] is the gate and then the other half; silu(gate) * up.
- "clamped": the two alternate, are clamped to `limit`, and give (up + 1) * gate * sigmoid(alpha * gate), as in gpt-oss.
"""

import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.checks import check_gated
from bigq_kernels.gpu import Gpu
from bigq_kernels.launch import launch
from bigq_kernels.tiles import ceil_div, next_power_of_2

__all__ = ["gated", "gated_backward"]

COLUMNS = 1024  # that a program takes


@triton.jit
def _both(x_ptr, column, WIDTH, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """(gate, up) of a row in float32."""
    if KIND == "silu":
        first = tl.load(x_ptr + column, mask=column < WIDTH, other=0)
        second = tl.load(x_ptr + WIDTH + column, mask=column < WIDTH, other=0)
    else:
        pair = 2 * column[:, None] + tl.arange(0, 2)[None, :]
        first, second = tl.split(tl.load(x_ptr + pair, mask=column[:, None] < WIDTH, other=0))
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _clamped(first, second, limit):
    """gate up to `limit`, and up from -limit to `limit`. NaN stays NaN, which the GPU's min and max would drop."""
    first = tl.minimum(first, limit, propagate_nan=tl.PropagateNan.ALL)
    second = tl.maximum(second, -limit, propagate_nan=tl.PropagateNan.ALL)
    return first, tl.minimum(second, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _gate_kernel(
    x_ptr,  # [S, 2 * WIDTH]
    out_ptr,  # [S, WIDTH]
    WIDTH,
    alpha,
    limit,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, second = _both(x_ptr + row * 2 * WIDTH, column, WIDTH, KIND, BLOCK)
    if KIND == "silu":
        out = first * tl.sigmoid(first) * second
    else:
        first, second = _clamped(first, second, limit)
        out = (second + 1.0) * first * tl.sigmoid(first * alpha)
    tl.store(out_ptr + row * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def _gate_backward_kernel(
    grad_ptr,  # [S, WIDTH]
    x_ptr,  # [S, 2 * WIDTH]
    out_ptr,  # [S, 2 * WIDTH]
    WIDTH,
    alpha,
    limit,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    out_ptr += row * 2 * WIDTH
    in_row = column < WIDTH
    grad = tl.load(grad_ptr + row * WIDTH + column, mask=in_row, other=0).to(tl.float32)
    first, second = _both(x_ptr + row * 2 * WIDTH, column, WIDTH, KIND, BLOCK)
    if KIND == "silu":
        share = tl.sigmoid(first)
        of_first = grad * second * share * (1.0 + first * (1.0 - share))
        of_second = grad * first * share
        tl.store(out_ptr + column, of_first.to(out_ptr.dtype.element_ty), mask=in_row)
        tl.store(out_ptr + WIDTH + column, of_second.to(out_ptr.dtype.element_ty), mask=in_row)
    else:
        low, middle = _clamped(first, second, limit)
        share = tl.sigmoid(low * alpha)
        of_first = grad * (middle + 1.0) * share * (1.0 + alpha * low * (1.0 - share))
        of_second = grad * low * share
        of_first = tl.where(first > limit, 0.0, of_first)
        of_second = tl.where(tl.abs(second) > limit, 0.0, of_second)
        pair = 2 * column[:, None] + tl.arange(0, 2)[None, :]
        both = tl.join(of_first, of_second).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + pair, both, mask=in_row[:, None])


def gated(x: Tensor, kind: str, alpha: float, limit: float) -> Tensor:
    """[S, WIDTH] of x [S, 2 * WIDTH], in its dtype; `alpha` and `limit` are those of "clamped"."""
    check_gated(x, None, kind)
    x = x.contiguous()
    rows, width = len(x), x.shape[1] // 2
    out = x.new_empty(rows, width)
    _launch(_gate_kernel, (x,), out, width, kind, alpha, limit)
    return out


def gated_backward(grad: Tensor, x: Tensor, kind: str, alpha: float, limit: float) -> Tensor:
    """The gradient of x [S, 2 * WIDTH] in `gated` from that of its result, grad [S, WIDTH]."""
    check_gated(x, grad, kind)
    x = x.contiguous()
    out = x.new_empty(x.shape)
    _launch(_gate_backward_kernel, (grad.contiguous(), x), out, x.shape[1] // 2, kind, alpha, limit)
    return out


def _launch(
    kernel: object, tensors: tuple[Tensor, ...], out: Tensor, width: int, kind: str, alpha: float, limit: float
) -> None:
    pdl = Gpu.of(out.device).pdl
    block = min(COLUMNS, next_power_of_2(width))
    launch(
        kernel, (len(out), ceil_div(width, block)), *tensors, out, width, float(alpha), float(limit),
        KIND=kind, BLOCK=block, PDL=pdl, options={"launch_pdl": pdl},
    )  # fmt: skip
