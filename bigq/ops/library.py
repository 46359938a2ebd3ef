"""The ops: torch.library schemas, fakes and gradients, and the implementation for each device.

CPU tensors use `bigq.ops.reference`. CUDA tensors use the Triton launchers of `bigq_kernels`, which are imported on
first use. There is no fallback from one to the other. `BIGQ_REFERENCE=1`, the library's only environment variable, runs
the reference on CUDA.

Every argument that is a scale (absmax, nested_absmax, nested_offset) is float32, or int32 of the same bits. Tensors
that do not fit together raise a RuntimeError, on each device and under fake tensors.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from importlib import import_module
from math import prod
from typing import Any

import torch
from torch import Tensor

from bigq.errors import UnsupportedError
from bigq.ops import checks, reference
from bigq.ops.replays import run
from bigq.ops.sharding import shard_width
from bigq.system.internals import as_result, check

__all__ = [
    "LIBRARY",
    "assign_slots",
    "bias_grad",
    "cuda_implementation",
    "dequantize_4bit",
    "dequantize_absmax",
    "dequantize_int8",
    "dequantized",
    "encode_scaled_4bit",
    "fill_slots",
    "grouped_linear_4bit",
    "grouped_linear_4bit_backward",
    "grouped_linear_int8",
    "grouped_linear_int8_backward",
    "grouped_matmul",
    "linear_4bit",
    "linear_int8",
    "multiplies_rows_apart",
    "quantize_4bit",
    "quantize_absmax",
    "quantize_int8",
    "routed_linear_4bit",
    "routed_linear_int8",
    "search_scales_4bit",
]

_SCHEMAS = {
    "quantize_4bit": "(Tensor weight, str quant_type, int block_size) -> (Tensor, Tensor)",
    "search_scales_4bit": "(Tensor weight, Tensor importance, str quant_type, int block_size) -> Tensor",
    "encode_scaled_4bit": "(Tensor weight, Tensor scales, str quant_type, int block_size) -> Tensor",
    "dequantize_4bit": (
        "(Tensor weight, Tensor absmax, str quant_type, int block_size, SymInt? in_features, ScalarType dtype) "
        "-> Tensor"
    ),
    "quantize_absmax": "(Tensor absmax) -> (Tensor, Tensor, Tensor)",
    "dequantize_absmax": "(Tensor codes, Tensor nested_absmax, Tensor nested_offset) -> Tensor",
    "linear_4bit": (
        "(Tensor x, Tensor weight, Tensor absmax, Tensor? bias, Tensor? nested_absmax, Tensor? nested_offset, "
        "str quant_type, int block_size, SymInt? in_features=None) -> Tensor"
    ),
    "grouped_linear_4bit": (
        "(Tensor x, Tensor stops, Tensor weight, Tensor absmax, Tensor? bias, Tensor? nested_absmax, "
        "Tensor? nested_offset, str quant_type, int block_size, SymInt? in_features=None) -> Tensor"
    ),
    "routed_linear_4bit": (
        "(Tensor x, Tensor ids, Tensor weight, Tensor absmax, Tensor? bias, Tensor? nested_absmax, "
        "Tensor? nested_offset, str quant_type, int block_size, SymInt? in_features=None, int? weights=None) -> Tensor"
    ),
    "grouped_linear_4bit_backward": (
        "(Tensor grad, Tensor stops, Tensor weight, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, "
        "str quant_type, int block_size, SymInt? in_features=None) -> Tensor"
    ),
    "grouped_matmul": "(Tensor x, Tensor stops, Tensor dense) -> Tensor",
    "assign_slots": "(Tensor ids, Tensor(a!) held, Tensor(b!) stamps, int weights) -> (Tensor, Tensor)",
    "fill_slots": "(Tensor copies, Tensor[] sources, Tensor(a!)[] pools) -> ()",
    "sort_rows": "(Tensor ids, int weights) -> (Tensor, Tensor, Tensor)",
    "take_rows": "(Tensor x, Tensor? order, Tensor? factors, SymInt rows, ScalarType dtype) -> Tensor",
    "sum_rows": "(Tensor rows, Tensor? places, Tensor? factors, SymInt tokens, ScalarType dtype) -> Tensor",
    "dot_rows": "(Tensor rows, Tensor? places, Tensor x, ScalarType dtype) -> Tensor",
    "gated": "(Tensor x, str kind, float alpha, float limit) -> Tensor",
    "gated_backward": "(Tensor grad, Tensor x, str kind, float alpha, float limit) -> Tensor",
    "quantize_int8": "(Tensor weight) -> (Tensor, Tensor)",
    "dequantize_int8": "(Tensor weight, Tensor absmax, ScalarType dtype) -> Tensor",
    "linear_int8": "(Tensor x, Tensor weight, Tensor absmax, Tensor? bias, float threshold) -> Tensor",
    "grouped_linear_int8": (
        "(Tensor x, Tensor stops, Tensor weight, Tensor absmax, Tensor? bias, float threshold) -> Tensor"
    ),
    "grouped_linear_int8_backward": "(Tensor grad, Tensor stops, Tensor weight, Tensor absmax) -> Tensor",
    "routed_linear_int8": (
        "(Tensor x, Tensor ids, Tensor weight, Tensor absmax, Tensor? bias, float threshold) -> Tensor"
    ),
}

_LAUNCHERS = {  # the module of each launcher, imported on first use
    "quantize_4bit": "bigq_kernels.block4.quantize",
    "search_scales_4bit": "bigq_kernels.block4.search",
    "encode_scaled_4bit": "bigq_kernels.block4.search",
    "dequantize_4bit": "bigq_kernels.block4.dequantize",
    "quantize_absmax": "bigq_kernels.block4.absmax",
    "dequantize_absmax": "bigq_kernels.block4.absmax",
    "linear_4bit": "bigq_kernels.block4.linear",
    "grouped_linear_4bit": "bigq_kernels.block4.grouped",
    "routed_linear_4bit": "bigq_kernels.block4.grouped",
    "grouped_linear_4bit_backward": "bigq_kernels.block4.grouped_gradient",
    "grouped_matmul": "bigq_kernels.grouped_matmul",
    "assign_slots": "bigq_kernels.slots",
    "fill_slots": "bigq_kernels.slots",
    "sort_rows": "bigq_kernels.rows",
    "take_rows": "bigq_kernels.rows",
    "sum_rows": "bigq_kernels.rows",
    "dot_rows": "bigq_kernels.rows",
    "gated": "bigq_kernels.gate",
    "gated_backward": "bigq_kernels.gate",
    "quantize_int8": "bigq_kernels.int8.quantize",
    "dequantize_int8": "bigq_kernels.int8.dequantize",
    "linear_int8": "bigq_kernels.int8.linear",
    "grouped_linear_int8": "bigq_kernels.int8.grouped",
    "grouped_linear_int8_backward": "bigq_kernels.int8.grouped_gradient",
    "routed_linear_int8": "bigq_kernels.int8.grouped",
    "linear_4bit_backward": "bigq_kernels.block4.linear",  # no op: the backward pass of an eager linear
    "linear_int8_backward": "bigq_kernels.int8.linear",
}


@cache
def cuda_implementation(name: str) -> Callable[..., Any]:
    """The function that the op `name` calls on CUDA tensors: its launcher, or the reference with BIGQ_REFERENCE=1."""
    if os.environ.get("BIGQ_REFERENCE") == "1":
        return getattr(reference, name)  # type: ignore[no-any-return]
    try:
        return getattr(import_module(_LAUNCHERS[name]), name)  # type: ignore[no-any-return]
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise UnsupportedError(
            f"bigq::{name} on a CUDA tensor needs Triton, which is not installed: pip install triton, "
            "or set BIGQ_REFERENCE=1 to run the slow torch implementation"
        ) from error


@lru_cache(maxsize=4096)
def multiplies_rows_apart(
    device: torch.device, rows: int, weights: int, n: int, k: int, block_size: int, dtype: torch.dtype
) -> bool:
    """Whether `routed_linear_4bit` of `rows` rows [k] with weights [n, k] multiplies each row by itself on `device`.

    The reference gives a row the bits that it has beside the same rows of its weight, wherever that stands.
    """
    if device.type != "cuda" or os.environ.get("BIGQ_REFERENCE") == "1":
        return True
    from bigq_kernels.block4.choose_grouped import choose_grouped, takes_rows

    return takes_rows(choose_grouped(device, rows, weights, n, k, block_size, dtype))


def _on_cuda(name: str) -> Callable[..., Any]:
    def implementation(*args: Any) -> Any:
        return cuda_implementation(name)(*args)

    def linear(x: Tensor, *args: Any) -> Any:
        tensors = 5 if isinstance(args[3], Tensor) else 3  # parts and bias: 5 with double quantization, otherwise 3
        return as_result(run(cuda_implementation, name, x, args[:tensors], args[tensors:]))

    return linear if name.startswith("linear") else implementation


LIBRARY = torch.library.Library("bigq", "DEF")
for _name, _schema in _SCHEMAS.items():
    LIBRARY.define(_name + _schema)
    LIBRARY.impl(_name, getattr(reference, _name), "CPU")
    LIBRARY.impl(_name, _on_cuda(_name), "CUDA")


@torch.library.register_fake("bigq::quantize_4bit", lib=LIBRARY)
def _(weight: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    packed = weight.new_empty(rows, (columns + 1) // 2, dtype=torch.uint8)
    return packed, weight.new_empty(rows, (columns + block_size - 1) // block_size, dtype=torch.float32)


@torch.library.register_fake("bigq::search_scales_4bit", lib=LIBRARY)
def _(weight: Tensor, importance: Tensor, quant_type: str, block_size: int) -> Tensor:
    checks.check_search_scales_4bit(weight, importance, check)
    rows, columns = weight.shape
    return weight.new_empty(rows, (columns + block_size - 1) // block_size, dtype=torch.float32)


@torch.library.register_fake("bigq::encode_scaled_4bit", lib=LIBRARY)
def _(weight: Tensor, scales: Tensor, quant_type: str, block_size: int) -> Tensor:
    checks.check_encode_scaled_4bit(weight, scales, block_size, check)
    rows, columns = weight.shape
    return weight.new_empty(rows, (columns + 1) // 2, dtype=torch.uint8)


@torch.library.register_fake("bigq::dequantize_4bit", lib=LIBRARY)
def _(
    weight: Tensor, absmax: Tensor, quant_type: str, block_size: int, in_features: int | None, dtype: torch.dtype
) -> Tensor:
    in_features = 2 * weight.shape[1] if in_features is None else in_features
    checks.check_dequantize_4bit(weight, absmax, None, None, block_size, in_features, check)
    return weight.new_empty(weight.shape[0], in_features, dtype=dtype)


@torch.library.register_fake("bigq::quantize_absmax", lib=LIBRARY)
def _(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    absmax = checks.as_floats(absmax)
    blocks = (absmax.numel() + reference.NESTED_BLOCK_SIZE - 1) // reference.NESTED_BLOCK_SIZE
    return torch.empty_like(absmax, dtype=torch.uint8), absmax.new_empty(blocks), absmax.new_empty(1)


@torch.library.register_fake("bigq::dequantize_absmax", lib=LIBRARY)
def _(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    checks.check_dequantize_absmax(codes, nested_absmax, nested_offset, check)
    return torch.empty_like(codes, dtype=torch.float32)


@torch.library.register_fake("bigq::linear_4bit", lib=LIBRARY)
def _(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int | None = None,
) -> Tensor:
    checks.check_linear_4bit(x, weight, absmax, bias, nested_absmax, nested_offset, block_size, in_features, check)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("bigq::grouped_linear_4bit", lib=LIBRARY)
def _(
    x: Tensor,
    stops: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int | None = None,
) -> Tensor:
    checks.check_grouped_linear_4bit(
        x, stops, weight, absmax, bias, nested_absmax, nested_offset, block_size, in_features, check
    )
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.register_fake("bigq::routed_linear_4bit", lib=LIBRARY)
def _(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int | None = None,
    weights: int | None = None,
) -> Tensor:
    checks.check_routed_linear_4bit(
        x, ids, weight, absmax, bias, nested_absmax, nested_offset, block_size, in_features, check
    )
    return x.new_empty(ids.shape[0], weight.shape[1])


@torch.library.register_fake("bigq::grouped_linear_4bit_backward", lib=LIBRARY)
def _(
    grad: Tensor,
    stops: Tensor,
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int | None = None,
) -> Tensor:
    in_features = 2 * weight.shape[-1] if in_features is None else in_features
    nested = (nested_absmax, nested_offset)
    checks.check_grouped_linear_4bit_backward(grad, stops, weight, absmax, *nested, block_size, in_features, check)
    return grad.new_empty(grad.shape[0], in_features)


@torch.library.register_fake("bigq::grouped_matmul", lib=LIBRARY)
def _(x: Tensor, stops: Tensor, dense: Tensor) -> Tensor:
    checks.check_grouped_matmul(x, stops, dense, check)
    return x.new_empty(x.shape[0], dense.shape[-1])


@torch.library.register_fake("bigq::assign_slots", lib=LIBRARY)
def _(ids: Tensor, held: Tensor, stamps: Tensor, weights: int) -> tuple[Tensor, Tensor]:
    checks.check_assign_slots(ids, held, stamps, check)
    return held.new_empty(ids.shape[0]), held.new_empty(ids.shape[0], 2)


@torch.library.register_fake("bigq::fill_slots", lib=LIBRARY)
def _(copies: Tensor, sources: Sequence[Tensor], pools: Sequence[Tensor]) -> None:
    checks.check_fill_slots(copies, sources, pools, check)


@torch.library.register_fake("bigq::sort_rows", lib=LIBRARY)
def _(ids: Tensor, weights: int) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_sort_rows(ids, check)
    places = torch.empty_like(ids, dtype=torch.int32)
    return torch.empty_like(ids, dtype=torch.int64), places, places.new_empty(weights)


@torch.library.register_fake("bigq::take_rows", lib=LIBRARY)
def _(x: Tensor, order: Tensor | None, factors: Tensor | None, rows: int, dtype: torch.dtype) -> Tensor:
    checks.check_rows(rows, x.shape[0], order, factors, x.device, check)
    return x.new_empty(rows, x.shape[1], dtype=dtype)


@torch.library.register_fake("bigq::sum_rows", lib=LIBRARY)
def _(rows: Tensor, places: Tensor | None, factors: Tensor | None, tokens: int, dtype: torch.dtype) -> Tensor:
    checks.check_rows(rows.shape[0], tokens, places, factors, rows.device, check)
    return rows.new_empty(tokens, rows.shape[1], dtype=dtype)


@torch.library.register_fake("bigq::dot_rows", lib=LIBRARY)
def _(rows: Tensor, places: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    checks.check_dot_rows(rows, places, x, check)
    return rows.new_empty(x.shape[0], rows.shape[0] // x.shape[0], dtype=dtype)


@torch.library.register_fake("bigq::gated", lib=LIBRARY)
def _(x: Tensor, kind: str, alpha: float, limit: float) -> Tensor:
    checks.check_gated(x, None, kind, check)
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@torch.library.register_fake("bigq::gated_backward", lib=LIBRARY)
def _(grad: Tensor, x: Tensor, kind: str, alpha: float, limit: float) -> Tensor:
    checks.check_gated(x, grad, kind, check)
    return torch.empty_like(x)


@torch.library.register_fake("bigq::quantize_int8", lib=LIBRARY)
def _(weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, dtype=torch.int8), weight.new_empty(weight.shape[0], 1, dtype=torch.float32)


@torch.library.register_fake("bigq::dequantize_int8", lib=LIBRARY)
def _(weight: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    checks.check_dequantize_int8(weight, absmax, check)
    return torch.empty_like(weight, dtype=dtype)


@torch.library.register_fake("bigq::linear_int8", lib=LIBRARY)
def _(x: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    checks.check_linear_int8(x, weight, absmax, bias, check)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("bigq::grouped_linear_int8", lib=LIBRARY)
def _(x: Tensor, stops: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    checks.check_grouped_linear_int8(x, stops, weight, absmax, bias, check)
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.register_fake("bigq::grouped_linear_int8_backward", lib=LIBRARY)
def _(grad: Tensor, stops: Tensor, weight: Tensor, absmax: Tensor) -> Tensor:
    checks.check_grouped_linear_int8_backward(grad, stops, weight, absmax, check)
    return grad.new_empty(grad.shape[0], weight.shape[2])


@torch.library.register_fake("bigq::routed_linear_int8", lib=LIBRARY)
def _(x: Tensor, ids: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    checks.check_routed_linear_int8(x, ids, weight, absmax, bias, check)
    return x.new_empty(ids.shape[0], weight.shape[1])


def _save_linear_4bit(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, absmax, bias, nested_absmax, nested_offset, ctx.quant_type, ctx.block_size, _ = inputs
    ctx.in_features, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype
    ctx.save_for_backward(weight, absmax, nested_absmax, nested_offset)


def _linear_4bit_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dX = dY @ dequantize(weight). The packed weight is frozen and has no gradient."""
    weight, absmax, *nested = ctx.saved_tensors
    settings = (ctx.quant_type, ctx.block_size, ctx.in_features)
    grad_x = grad @ _dense_4bit(weight, absmax, nested, settings, grad.dtype) if ctx.needs_input_grad[0] else None
    return grad_x, None, None, _bias_grad(ctx, grad, 3), None, None, None, None, None


def _save_linear_int8(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, absmax, bias, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(weight, absmax)


def _linear_int8_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dX = dY @ dequantize(weight): the gradient of rounding x to int8 is 1 (straight-through estimator)."""
    weight, absmax = ctx.saved_tensors
    grad_x = grad @ dequantize_int8(weight, absmax, grad.dtype) if ctx.needs_input_grad[0] else None
    return grad_x, None, None, _bias_grad(ctx, grad, 3), None


def _bias_grad(ctx: Any, grad: Tensor, position: int) -> Tensor | None:
    return bias_grad(grad, ctx.bias_dtype) if ctx.needs_input_grad[position] else None


def bias_grad(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a bias [N] from that of the output [..., N], summed in float32."""
    rows = grad.reshape(prod(grad.shape[:-1]), grad.shape[-1])  # -1 is ambiguous for a weight without rows
    return rows.sum(dim=0, dtype=torch.float32).to(dtype)


def dequantized(
    name: str, packed: Tensor, absmax: Tensor, nested: Sequence[Tensor], settings: tuple[Any, ...], dtype: torch.dtype
) -> Tensor:
    """The weight [N, K] in `dtype` of the linear op `name`, whose last settings say K, if its tensors do not."""
    if name == "linear_int8":
        return dequantize_int8(packed, absmax, dtype)  # type: ignore[no-any-return]
    return _dense_4bit(packed, absmax, nested, settings[-3:], dtype)


def _dense_4bit(
    packed: Tensor, absmax: Tensor, nested: Sequence[Tensor | None], settings: tuple[Any, ...], dtype: torch.dtype
) -> Tensor:
    """The weight [N, K] in `dtype`. `nested` are the two tensors that absmax is decoded with, or None or nothing."""
    if nested and nested[0] is not None:
        absmax = dequantize_absmax(absmax, *nested)
    quant_type, block_size, in_features = settings
    return dequantize_4bit(packed, absmax, quant_type, block_size, shard_width(packed, in_features), dtype)  # type: ignore[no-any-return]


torch.library.register_autograd(
    "bigq::linear_4bit", _linear_4bit_backward, setup_context=_save_linear_4bit, lib=LIBRARY
)
torch.library.register_autograd(
    "bigq::linear_int8", _linear_int8_backward, setup_context=_save_linear_int8, lib=LIBRARY
)

quantize_4bit = torch.ops.bigq.quantize_4bit.default
search_scales_4bit = torch.ops.bigq.search_scales_4bit.default
encode_scaled_4bit = torch.ops.bigq.encode_scaled_4bit.default
dequantize_4bit = torch.ops.bigq.dequantize_4bit.default
quantize_absmax = torch.ops.bigq.quantize_absmax.default
dequantize_absmax = torch.ops.bigq.dequantize_absmax.default
linear_4bit = torch.ops.bigq.linear_4bit.default
grouped_linear_4bit = torch.ops.bigq.grouped_linear_4bit.default
routed_linear_4bit = torch.ops.bigq.routed_linear_4bit.default
grouped_linear_4bit_backward = torch.ops.bigq.grouped_linear_4bit_backward.default
grouped_matmul = torch.ops.bigq.grouped_matmul.default
assign_slots = torch.ops.bigq.assign_slots.default
fill_slots = torch.ops.bigq.fill_slots.default
quantize_int8 = torch.ops.bigq.quantize_int8.default
dequantize_int8 = torch.ops.bigq.dequantize_int8.default
linear_int8 = torch.ops.bigq.linear_int8.default
grouped_linear_int8_backward = torch.ops.bigq.grouped_linear_int8_backward.default
grouped_linear_int8 = torch.ops.bigq.grouped_linear_int8.default
routed_linear_int8 = torch.ops.bigq.routed_linear_int8.default
