"""Ops: the reference of each in torch; their schemas, fakes and gradients; and the implementation for each device."""

from bigq.ops.library import (
    cuda_implementation,
    dequantize_4bit,
    dequantize_absmax,
    dequantize_int8,
    encode_scaled_4bit,
    grouped_linear_4bit,
    grouped_linear_4bit_backward,
    grouped_linear_int8,
    grouped_matmul,
    linear_4bit,
    linear_int8,
    quantize_4bit,
    quantize_absmax,
    quantize_int8,
    routed_linear_4bit,
    routed_linear_int8,
    search_scales_4bit,
)
from bigq.ops.stack_gradients import stack_gradients

__all__ = [
    "cuda_implementation",
    "dequantize_4bit",
    "dequantize_absmax",
    "dequantize_int8",
    "encode_scaled_4bit",
    "grouped_linear_4bit",
    "grouped_linear_4bit_backward",
    "grouped_linear_int8",
    "grouped_matmul",
    "linear_4bit",
    "linear_int8",
    "quantize_4bit",
    "quantize_absmax",
    "quantize_int8",
    "routed_linear_4bit",
    "routed_linear_int8",
    "search_scales_4bit",
    "stack_gradients",
]
