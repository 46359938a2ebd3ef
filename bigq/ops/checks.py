"""Checks of the ops: the tensors of a quantized weight have to fit together, in shape, dtype and device.

A kernel reads memory by address. A tensor of a wrong width, or a scale that was cast, would give a wrong number or a
read out of bounds. `bigq_kernels.checks` has the same functions for the launchers, which do not import bigq.

Each check calls `expect(condition, message)`: by default it raises an UnsupportedError, and for fakes it is
torch._check.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from bigq.errors import UnsupportedError

__all__ = [
    "MAX_PARTS",
    "NESTED_BLOCK_SIZE",
    "as_floats",
    "check_assign_slots",
    "check_dequantize_4bit",
    "check_dequantize_absmax",
    "check_dequantize_int8",
    "check_dot_rows",
    "check_encode_scaled_4bit",
    "check_fill_slots",
    "check_gated",
    "check_grouped_linear_4bit",
    "check_grouped_linear_4bit_backward",
    "check_grouped_linear_int8",
    "check_grouped_linear_int8_backward",
    "check_grouped_matmul",
    "check_linear_4bit",
    "check_linear_int8",
    "check_routed_linear_4bit",
    "check_routed_linear_int8",
    "check_rows",
    "check_search_scales_4bit",
    "check_sort_rows",
]

MAX_PARTS = 8  # of a stack in slots: codes, scales, second-level scales and biases of two weights
NESTED_BLOCK_SIZE = 256  # scales that share one second-level scale in double quantization
_SCALES = (torch.float32, torch.int32)
_INDICES = (torch.int32, torch.int64)

Expect = Callable[[bool, Callable[[], str]], object]  # (condition, message if it is false), like torch._check


def as_floats(bits: Tensor) -> Tensor:
    """View scales that are float32, or int32 of the same bits, as float32."""
    if bits.dtype == torch.float32:
        return bits
    _expect(bits.dtype == torch.int32, lambda: f"scales are {bits.dtype}; expected one of {_SCALES}")
    return bits.view(torch.float32)


def _expect(condition: bool, message: Callable[[], str]) -> None:
    if not condition:
        raise UnsupportedError(message())


def _check(
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    device: torch.device,
    expect: Expect,
) -> None:
    def message() -> str:
        expected = " or ".join(map(str, dtypes))
        return (
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
            f"expected {expected} {list(shape)} on {device}"
        )

    expect(tensor.dtype in dtypes and tensor.device == device and tensor.dim() == len(shape), message)
    for size, expected_size in zip(tensor.shape, shape, strict=True):
        expect(size == expected_size, message)


def check_linear_4bit(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    block_size: int,
    in_features: int | None,
    expect: Expect = _expect,
) -> None:
    """Check that x [..., K], a 4-bit weight [N, K] and bias [N] fit together."""
    if in_features is not None:
        expect(
            x.shape[-1] == in_features,
            lambda: f"x is {list(x.shape)}; expected [..., {in_features}], the in_features of the weight",
        )
    _check_width(x, weight, (x.shape[-1] + 1) // 2, expect)
    check_dequantize_4bit(weight, absmax, nested_absmax, nested_offset, block_size, x.shape[-1], expect)
    _check_beside(x, weight, bias, expect)


def check_grouped_linear_4bit(
    x: Tensor,
    stops: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    block_size: int,
    in_features: int | None,
    expect: Expect = _expect,
) -> None:
    """Check that x [S, K], stops [E], a stack of 4-bit weights [E, N, K] and bias [E, N] fit together."""
    _check_stack(x, weight, absmax, bias, nested_absmax, nested_offset, block_size, in_features, expect)
    _check_stops(stops, weight, expect)


def check_routed_linear_4bit(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    block_size: int,
    in_features: int | None,
    expect: Expect = _expect,
) -> None:
    """Check that x [M, K], ids [S], a stack of 4-bit weights [E, N, K] and bias [E, N] fit together."""
    _check_stack(x, weight, absmax, bias, nested_absmax, nested_offset, block_size, in_features, expect)
    _check_ids(ids, x, weight, expect)


def _check_stack(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    block_size: int,
    in_features: int | None,
    expect: Expect,
) -> None:
    expect(
        x.dim() == 2 and weight.dim() == 3,
        lambda: f"x is {list(x.shape)} and the weight {list(weight.shape)}; expected [S, K] and [E, N, ceil(K/2)]",
    )
    matrix, scales = weight.flatten(0, 1), absmax.flatten(0, 1)
    row_bias = bias if bias is None else bias.flatten()
    check_linear_4bit(x, matrix, scales, row_bias, nested_absmax, nested_offset, block_size, in_features, expect)


def check_grouped_linear_4bit_backward(
    grad: Tensor,
    stops: Tensor,
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    block_size: int,
    in_features: int,
    expect: Expect = _expect,
) -> None:
    """Check that grad [S, N], stops [E] and a stack of 4-bit weights [E, N, in_features] fit together."""
    expect(
        grad.dim() == 2 and weight.dim() == 3 and grad.shape[1] == weight.shape[1],
        lambda: (
            f"grad is {list(grad.shape)} and the weight {list(weight.shape)}; expected [S, N] and [E, N, ceil(K/2)]"
        ),
    )
    matrix, scales = weight.flatten(0, 1), absmax.flatten(0, 1)
    check_dequantize_4bit(matrix, scales, nested_absmax, nested_offset, block_size, in_features, expect)
    _check_beside(grad, weight, None, expect)
    _check_stops(stops, weight, expect)


def check_grouped_matmul(x: Tensor, stops: Tensor, dense: Tensor, expect: Expect = _expect) -> None:
    """Check that x [S, K], stops [E] and a stack of weights [E, K, N] fit together."""
    expect(
        x.dim() == 2 and dense.dim() == 3 and x.shape[1] == dense.shape[1] and x.dtype == dense.dtype,
        lambda: (
            f"x is {x.dtype} {list(x.shape)} and the weight {dense.dtype} {list(dense.shape)}; expected one dtype, "
            "and [S, K] and [E, K, N]"
        ),
    )
    _check("stops", stops, (torch.int32,), (dense.shape[0],), dense.device, expect)


def check_linear_int8(x: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None, expect: Expect = _expect) -> None:
    """Check that x [..., K], an int8 weight [N, K] and bias [N] fit together."""
    _check_width(x, weight, x.shape[-1], expect)
    check_dequantize_int8(weight, absmax, expect)
    _check_beside(x, weight, bias, expect)


def check_grouped_linear_int8(
    x: Tensor, stops: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None, expect: Expect = _expect
) -> None:
    """Check that x [S, K], stops [E], a stack of int8 weights [E, N, K] and bias [E, N] fit together."""
    _check_stack_int8(x, weight, absmax, bias, expect)
    _check_stops(stops, weight, expect)


def check_grouped_linear_int8_backward(
    grad: Tensor, stops: Tensor, weight: Tensor, absmax: Tensor, expect: Expect = _expect
) -> None:
    """Check that grad [S, N], stops [E] and a stack of int8 weights [E, N, K] fit together."""
    expect(
        grad.dim() == 2 and weight.dim() == 3 and grad.shape[1] == weight.shape[1],
        lambda: f"grad is {list(grad.shape)} and the weight {list(weight.shape)}; expected [S, N] and [E, N, K]",
    )
    _check("weight", weight, (torch.int8,), tuple(weight.shape), weight.device, expect)
    _check("absmax", absmax, _SCALES, (*weight.shape[:-1], 1), weight.device, expect)
    _check_beside(grad, weight, None, expect)
    _check_stops(stops, weight, expect)


def check_routed_linear_int8(
    x: Tensor, ids: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None, expect: Expect = _expect
) -> None:
    """Check that x [M, K], ids [S], a stack of int8 weights [E, N, K] and bias [E, N] fit together."""
    _check_stack_int8(x, weight, absmax, bias, expect)
    _check_ids(ids, x, weight, expect)


def _check_stack_int8(x: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None, expect: Expect) -> None:
    expect(
        x.dim() == 2 and weight.dim() == 3,
        lambda: f"x is {list(x.shape)} and the weight {list(weight.shape)}; expected [S, K] and [E, N, K]",
    )
    _check_width(x, weight, x.shape[-1], expect)
    _check("weight", weight, (torch.int8,), tuple(weight.shape), weight.device, expect)
    _check("absmax", absmax, _SCALES, (*weight.shape[:-1], 1), weight.device, expect)
    _check_beside(x, weight, bias, expect)


def _check_stops(stops: Tensor, weight: Tensor, expect: Expect) -> None:
    _check("stops", stops, (torch.int32,), (weight.shape[0],), weight.device, expect)


def _check_ids(ids: Tensor, x: Tensor, weight: Tensor, expect: Expect) -> None:
    _check("ids", ids, _INDICES, (ids.numel(),), weight.device, expect)
    expect(
        ids.shape[0] % x.shape[0] == 0 if x.shape[0] else ids.shape[0] == 0,
        lambda: f"ids is {list(ids.shape)} and x {list(x.shape)}; expected a multiple of the rows of x",
    )


def check_sort_rows(ids: Tensor, expect: Expect = _expect) -> None:
    """Check that ids are indices [S]."""
    _check("ids", ids, _INDICES, (ids.numel(),), ids.device, expect)


def check_rows(
    rows: int,
    tokens: int,
    places: Tensor | None,
    factors: Tensor | None,
    device: torch.device,
    expect: Expect = _expect,
) -> None:
    """Check that each token has as many rows, and that places [rows] and factors [tokens, top_k] fit."""
    expect(
        tokens != 0 and rows % tokens == 0,
        lambda: f"{tokens} tokens have {rows} rows; expected a multiple of the tokens",
    )
    if places is not None:
        _check("the places of rows", places, _INDICES, (rows,), device, expect)
    if factors is not None:
        _check("factors", factors, (factors.dtype,), (tokens, rows // tokens), device, expect)


def check_dot_rows(rows: Tensor, places: Tensor | None, x: Tensor, expect: Expect = _expect) -> None:
    """Check that rows [S, N], places [S] and x [T, N] fit together."""
    check_rows(rows.shape[0], x.shape[0], places, None, rows.device, expect)
    _check("x", x, (x.dtype,), (x.shape[0], rows.shape[1]), rows.device, expect)


def check_gated(x: Tensor, grad: Tensor | None, kind: str, expect: Expect = _expect) -> None:
    """Check that x is [S, 2 * WIDTH], grad [S, WIDTH], and the gate `kind` is known."""
    expect(
        x.dim() == 2 and x.shape[1] % 2 == 0 and kind in ("silu", "clamped"),
        lambda: f"x is {list(x.shape)} and the gate {kind!r}; expected [S, 2 * WIDTH], and silu or clamped",
    )
    if grad is not None:
        _check("grad", grad, (grad.dtype,), (x.shape[0], x.shape[1] // 2), x.device, expect)


def check_assign_slots(ids: Tensor, held: Tensor, stamps: Tensor, expect: Expect = _expect) -> None:
    """Check that ids [R], held [S] and stamps [S] fit together, and that there is a slot for each id."""
    _check("ids", ids, _INDICES, (ids.numel(),), held.device, expect)
    _check("held", held, (torch.int32,), (held.numel(),), held.device, expect)
    _check("stamps", stamps, (torch.int64,), (held.numel(),), held.device, expect)
    expect(
        ids.shape[0] <= held.shape[0],
        lambda: f"ids is {list(ids.shape)} and held {list(held.shape)}; expected a slot for each id",
    )
    contiguous = held.is_contiguous() and stamps.is_contiguous()
    expect(contiguous, lambda: "held or stamps is not contiguous; expected contiguous tensors")


def check_fill_slots(
    copies: Tensor, sources: Sequence[Tensor], pools: Sequence[Tensor], expect: Expect = _expect
) -> None:
    """Check that copies [R, 2], the parts [E, n] of a stack and those of its slots, [S, n], fit together."""
    _check("copies", copies, (torch.int32,), (copies.shape[0], 2), copies.device, expect)
    expect(
        0 < len(sources) == len(pools) <= MAX_PARTS,
        lambda: f"there are {len(sources)} sources and {len(pools)} pools; expected as many, 1 to {MAX_PARTS}",
    )
    for source, pool in zip(sources, pools, strict=True):
        for name, part, first in (("a source", source, sources[0]), ("a pool", pool, pools[0])):
            _check(name, part, (pool.dtype,), (first.shape[0], pool.shape[-1]), copies.device, expect)
            expect(part.is_contiguous(), partial(str, f"{name} is not contiguous; expected contiguous parts"))


def check_search_scales_4bit(weight: Tensor, importance: Tensor, expect: Expect = _expect) -> None:
    """Check that `importance` has a float32 number for each column of a float weight [N, K]."""
    _check("importance", importance, (torch.float32,), (weight.shape[-1],), weight.device, expect)


def check_encode_scaled_4bit(weight: Tensor, scales: Tensor, block_size: int, expect: Expect = _expect) -> None:
    """Check that `scales` has a float32 number for each block of a float weight [N, K]."""
    rows, columns = weight.shape
    shape = rows, (columns + block_size - 1) // block_size
    _check("scales", scales, (torch.float32,), shape, weight.device, expect)


def check_dequantize_4bit(
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    block_size: int,
    in_features: int,
    expect: Expect = _expect,
) -> None:
    """Check the tensors of a 4-bit weight [N, in_features]; absmax is uint8 if the nested pair is given."""
    rows, device = weight.shape[0], weight.device
    _check("weight", weight, (torch.uint8,), (rows, (in_features + 1) // 2), device, expect)
    expect(
        (nested_absmax is None) == (nested_offset is None),
        lambda: "one of nested_absmax and nested_offset is None; expected both tensors, or neither",
    )
    blocks = (in_features + block_size - 1) // block_size
    _check("absmax", absmax, _SCALES if nested_absmax is None else (torch.uint8,), (rows, blocks), device, expect)
    if nested_absmax is not None and nested_offset is not None:
        check_dequantize_absmax(absmax, nested_absmax, nested_offset, expect)


def check_dequantize_absmax(
    codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor, expect: Expect = _expect
) -> None:
    """Check the tensors of quantized scales (double quantization), of any shape."""
    blocks = (codes.numel() + NESTED_BLOCK_SIZE - 1) // NESTED_BLOCK_SIZE
    _check("absmax", codes, (torch.uint8,), codes.shape, codes.device, expect)
    _check("nested_absmax", nested_absmax, _SCALES, (blocks,), codes.device, expect)
    _check("nested_offset", nested_offset, _SCALES, (1,), codes.device, expect)


def check_dequantize_int8(weight: Tensor, absmax: Tensor, expect: Expect = _expect) -> None:
    """Check the tensors of an int8 weight [N, K]."""
    _check("weight", weight, (torch.int8,), (weight.shape[0], weight.shape[-1]), weight.device, expect)
    _check("absmax", absmax, _SCALES, (weight.shape[0], 1), weight.device, expect)


def _check_width(x: Tensor, weight: Tensor, width: int, expect: Expect) -> None:
    expect(
        weight.shape[-1] == width,
        lambda: (
            f"x and weight differ in in_features: x is {list(x.shape)} and the weight {weight.dtype} "
            f"{list(weight.shape)}; expected a weight [N, {width}]"
        ),
    )


def _check_beside(x: Tensor, weight: Tensor, bias: Tensor | None, expect: Expect) -> None:
    device = weight.device
    expect(x.device == device, lambda: f"x is on {x.device}, and the weight on {device}; expected one device")
    if bias is not None:
        _check("bias", bias, (bias.dtype,), tuple(weight.shape[:-1]), device, expect)
