"""What launchers refuse: tensors of a quantized weight that are not of the shape, dtype and device a kernel reads.

A kernel reads by address: a wrong width or a cast scale would give a wrong number, or a read out of bounds. Attributes
are compared and no op runs: 1 to 2 us a linear. A replay is bound to attributes that passed, and asks nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bigq_kernels.tiles import NESTED_BLOCK_SIZE

__all__ = [
    "MAX_PARTS",
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
    "check_linear_4bit",
    "check_linear_int8",
    "check_routed_linear_4bit",
    "check_routed_linear_int8",
    "check_rows",
    "check_search_scales_4bit",
    "check_sort_rows",
]

MAX_PARTS = 8  # of a stack in slots: codes, scales, second-level scales and biases of two weights
_BLOCK: int = NESTED_BLOCK_SIZE.value
_UINT8 = (torch.uint8,)
_INT8 = (torch.int8,)
_FLOAT32 = (torch.float32,)
_SCALES = (torch.float32, torch.int32)
_INDICES = (torch.int32, torch.int64)


def as_floats(bits: Tensor) -> Tensor:
    """The float32 scales in `bits`, which is float32, or int32 of the same bits; shares its memory."""
    dtype = bits.dtype
    if dtype is torch.float32:
        return bits
    if dtype is not torch.int32:
        raise RuntimeError(f"scales are {dtype}; expected torch.float32, or torch.int32 of the same bits")
    return bits.view(torch.float32)


def check_linear_4bit(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    block_size: int,
    in_features: int | None,
) -> None:
    """Raise RuntimeError unless x [..., K], a 4-bit weight [N, K] and bias [N] fit together."""
    k = x.shape[-1]
    if in_features is not None and k != in_features:
        raise RuntimeError(f"x is {list(x.shape)}; expected [..., {in_features}], the in_features of the weight")
    shape, device = weight.shape, weight.device
    if shape[-1] != (k + 1) // 2:
        raise _widths_differ(x, weight, (k + 1) // 2)
    _check_4bit(weight, absmax, nested_absmax, nested_offset, block_size, k, shape[0], device)
    _check_beside(x, bias, (shape[0],), device)


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
) -> None:
    """Raise RuntimeError unless x [S, K], stops [E], 4-bit weights [E, N, K] and bias [E, N] fit together."""
    _check_stack(x, weight, absmax, bias, nested_absmax, nested_offset, block_size, in_features)
    _check_stops(stops, weight)


def check_grouped_linear_4bit_backward(
    grad: Tensor,
    stops: Tensor,
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    block_size: int,
    in_features: int,
) -> None:
    """Raise RuntimeError unless grad [S, N], stops [E] and 4-bit weights [E, N, in_features] fit together."""
    if grad.dim() != 2 or weight.dim() != 3 or grad.shape[1] != weight.shape[1]:
        raise RuntimeError(
            f"grad is {list(grad.shape)} and the weight {list(weight.shape)}; expected [S, N] and [E, N, ceil(K/2)]"
        )
    (e, n, width), device = weight.shape, weight.device
    matrix, scales = weight.view(e * n, width), absmax.view(e * n, absmax.shape[-1])
    _check_4bit(matrix, scales, nested_absmax, nested_offset, block_size, in_features, e * n, device)
    _check_beside(grad, None, (), device)
    _check_stops(stops, weight)


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
) -> None:
    """Raise RuntimeError unless x [M, K], ids [S], 4-bit weights [E, N, K] and bias [E, N] fit together."""
    _check_stack(x, weight, absmax, bias, nested_absmax, nested_offset, block_size, in_features)
    _check_ids(ids, x, weight)


def _check_stack(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    block_size: int,
    in_features: int | None,
) -> None:
    if x.dim() != 2 or weight.dim() != 3:
        raise RuntimeError(
            f"x is {list(x.shape)} and the weight {list(weight.shape)}; expected [S, K] and [E, N, ceil(K/2)]"
        )
    (e, n, width), k = weight.shape, x.shape[1]
    if in_features is not None and k != in_features:
        raise RuntimeError(f"x is {list(x.shape)}; expected [..., {in_features}], the in_features of the weight")
    if width != (k + 1) // 2:
        raise _widths_differ(x, weight, (k + 1) // 2)
    matrix, scales = weight.view(e * n, width), absmax.view(e * n, absmax.shape[-1])
    _check_4bit(matrix, scales, nested_absmax, nested_offset, block_size, k, e * n, weight.device)
    _check_beside(x, bias if bias is None else bias.view(-1), (e * n,), weight.device)


def check_linear_int8(x: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None) -> None:
    """Raise RuntimeError unless x [..., K], an int8 weight [N, K] and bias [N] fit together."""
    k, shape, device = x.shape[-1], weight.shape, weight.device
    if shape[-1] != k:
        raise _widths_differ(x, weight, k)
    _check_int8(weight, absmax, shape[0], k, device)
    _check_beside(x, bias, (shape[0],), device)


def check_grouped_linear_int8(x: Tensor, stops: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None) -> None:
    """Raise RuntimeError unless x [S, K], stops [E], int8 weights [E, N, K] and bias [E, N] fit together."""
    _check_stack_int8(x, weight, absmax, bias)
    _check_stops(stops, weight)


def check_grouped_linear_int8_backward(grad: Tensor, stops: Tensor, weight: Tensor, absmax: Tensor) -> None:
    """Raise RuntimeError unless grad [S, N], stops [E] and int8 weights [E, N, K] fit together."""
    if grad.dim() != 2 or weight.dim() != 3 or grad.shape[1] != weight.shape[1]:
        raise RuntimeError(
            f"grad is {list(grad.shape)} and the weight {list(weight.shape)}; expected [S, N] and [E, N, K]"
        )
    _check("weight", weight, _INT8, weight.shape, weight.device)
    _check("absmax", absmax, _SCALES, (*weight.shape[:2], 1), weight.device)
    _check_beside(grad, None, (), weight.device)
    _check_stops(stops, weight)


def check_routed_linear_int8(x: Tensor, ids: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None) -> None:
    """Raise RuntimeError unless x [M, K], ids [S], int8 weights [E, N, K] and bias [E, N] fit together."""
    _check_stack_int8(x, weight, absmax, bias)
    _check_ids(ids, x, weight)


def _check_stack_int8(x: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 2 or weight.dim() != 3:
        raise RuntimeError(f"x is {list(x.shape)} and the weight {list(weight.shape)}; expected [S, K] and [E, N, K]")
    e, n, k = weight.shape
    if k != x.shape[1]:
        raise _widths_differ(x, weight, x.shape[1])
    _check("weight", weight, _INT8, (e, n, k), weight.device)
    _check("absmax", absmax, _SCALES, (e, n, 1), weight.device)
    _check_beside(x, bias, (e, n), weight.device)


def _check_stops(stops: Tensor, weight: Tensor) -> None:
    _check("stops", stops, (torch.int32,), (len(weight),), weight.device)


def _check_ids(ids: Tensor, x: Tensor, weight: Tensor) -> None:
    _check("ids", ids, _INDICES, (ids.numel(),), weight.device)
    if len(ids) % len(x) if len(x) else len(ids):
        raise RuntimeError(f"ids is {list(ids.shape)} and x {list(x.shape)}; expected a multiple of the rows of x")


def check_dequantize_4bit(
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    block_size: int,
    in_features: int,
) -> None:
    """Raise RuntimeError unless the tensors are those of a 4-bit weight [N, in_features]."""
    _check_4bit(weight, absmax, nested_absmax, nested_offset, block_size, in_features, weight.shape[0], weight.device)


def check_dequantize_int8(weight: Tensor, absmax: Tensor) -> None:
    """Raise RuntimeError unless the tensors are those of an int8 weight [N, K]."""
    _check_int8(weight, absmax, weight.shape[0], weight.shape[-1], weight.device)


def check_dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> None:
    """Raise RuntimeError unless the tensors are those of nested scales, of any shape."""
    _check("absmax", codes, _UINT8, codes.shape, codes.device)
    _check_nested(nested_absmax, nested_offset, codes.numel(), codes.device)


def check_search_scales_4bit(weight: Tensor, importance: Tensor) -> None:
    """Raise RuntimeError unless `importance` has a float32 number for each column of a weight [N, K]."""
    _check("importance", importance, _FLOAT32, (weight.shape[-1],), weight.device)


def check_encode_scaled_4bit(weight: Tensor, scales: Tensor, block_size: int) -> None:
    """Raise RuntimeError unless `scales` has a float32 number for each block of a float weight [N, K]."""
    rows, columns = weight.shape
    _check("scales", scales, _FLOAT32, (rows, (columns + block_size - 1) // block_size), weight.device)


def check_sort_rows(ids: Tensor) -> None:
    """Raise RuntimeError unless ids are indices [S]."""
    _check("ids", ids, _INDICES, (ids.numel(),), ids.device)


def check_assign_slots(ids: Tensor, held: Tensor, stamps: Tensor) -> None:
    """Raise RuntimeError unless ids [R], held [S] and stamps [S] fit together, and there is a slot for each id."""
    _check("ids", ids, _INDICES, (ids.numel(),), held.device)
    _check("held", held, (torch.int32,), (held.numel(),), held.device)
    _check("stamps", stamps, (torch.int64,), (held.numel(),), held.device)
    if len(ids) > len(held):
        raise RuntimeError(f"ids is {list(ids.shape)} and held {list(held.shape)}; expected a slot for each id")
    if not (held.is_contiguous() and stamps.is_contiguous()):
        raise RuntimeError("held or stamps is not contiguous; expected contiguous tensors")


def check_fill_slots(copies: Tensor, sources: Sequence[Tensor], pools: Sequence[Tensor]) -> None:
    """Raise RuntimeError unless copies [R, 2], the parts [E, n] of a stack and those of its slots, [S, n], fit."""
    _check("copies", copies, (torch.int32,), (len(copies), 2), copies.device)
    if not 0 < len(sources) == len(pools) <= MAX_PARTS:
        raise RuntimeError(
            f"there are {len(sources)} sources and {len(pools)} pools; expected as many, 1 to {MAX_PARTS}"
        )
    for source, pool in zip(sources, pools, strict=True):
        for name, part, first in (("a source", source, sources[0]), ("a pool", pool, pools[0])):
            _check(name, part, (pool.dtype,), (first.shape[0], pool.shape[-1]), copies.device)
            if not part.is_contiguous():
                raise RuntimeError(f"{name} is not contiguous; expected contiguous parts")


def check_rows(rows: int, tokens: int, places: Tensor | None, factors: Tensor | None, device: torch.device) -> None:
    """Raise RuntimeError unless each token has as many rows, and places [rows] and factors [tokens, top_k] fit."""
    if not tokens or rows % tokens:
        raise RuntimeError(f"{tokens} tokens have {rows} rows; expected a multiple of the tokens")
    if places is not None:
        _check("the places of rows", places, _INDICES, (rows,), device)
    if factors is not None:
        _check("factors", factors, None, (tokens, rows // tokens), device)


def check_dot_rows(rows: Tensor, places: Tensor | None, x: Tensor) -> None:
    """Raise RuntimeError unless rows [S, N], places [S] and x [T, N] fit together."""
    check_rows(len(rows), len(x), places, None, rows.device)
    _check("x", x, None, (len(x), rows.shape[1]), rows.device)


def check_gated(x: Tensor, grad: Tensor | None, kind: str) -> None:
    """Raise RuntimeError unless x is [S, 2 * WIDTH], grad [S, WIDTH], and the gate `kind` is known."""
    if x.dim() != 2 or x.shape[1] % 2 or kind not in ("silu", "clamped"):
        raise RuntimeError(f"x is {list(x.shape)} and the gate {kind!r}; expected [S, 2 * WIDTH], and silu or clamped")
    if grad is not None:
        _check("grad", grad, None, (len(x), x.shape[1] // 2), x.device)


def _check_4bit(
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    block_size: int,
    columns: int,
    rows: int,
    device: torch.device,
) -> None:
    blocks = (columns + block_size - 1) // block_size
    _check("weight", weight, _UINT8, (rows, (columns + 1) // 2), device)
    if nested_absmax is not None and nested_offset is not None:
        _check("absmax", absmax, _UINT8, (rows, blocks), device)
        _check_nested(nested_absmax, nested_offset, rows * blocks, device)
    elif nested_absmax is nested_offset:
        _check("absmax", absmax, _SCALES, (rows, blocks), device)
    else:
        raise RuntimeError("one of nested_absmax and nested_offset is None; expected both tensors, or neither")


def _check_nested(nested_absmax: Tensor, nested_offset: Tensor, numel: int, device: torch.device) -> None:
    _check("nested_absmax", nested_absmax, _SCALES, ((numel + _BLOCK - 1) // _BLOCK,), device)
    _check("nested_offset", nested_offset, _SCALES, (1,), device)


def _check_int8(weight: Tensor, absmax: Tensor, rows: int, columns: int, device: torch.device) -> None:
    _check("weight", weight, _INT8, (rows, columns), device)
    _check("absmax", absmax, _SCALES, (rows, 1), device)


def _check_beside(x: Tensor, bias: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    if x.device != device:
        raise RuntimeError(f"x is on {x.device}, and the weight on {device}; expected one device")
    if bias is not None:
        _check("bias", bias, None, shape, device)


def _check(
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...] | None,
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    if (dtypes and tensor.dtype not in dtypes) or tensor.shape != shape or tensor.device != device:
        expected = " or ".join(map(str, dtypes or (tensor.dtype,)))
        raise RuntimeError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
            f"expected {expected} {list(shape)} on {device}"
        )


def _widths_differ(x: Tensor, weight: Tensor, width: int) -> RuntimeError:
    return RuntimeError(
        f"x and weight differ in in_features: x is {list(x.shape)} and the weight {weight.dtype} {list(weight.shape)}; "
        f"expected a weight [N, {width}]"
    )
