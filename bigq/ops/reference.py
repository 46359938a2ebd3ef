"""The numerical specification of every op in plain torch, which is also the CPU implementation.

Shapes: N = out_features (rows), K = in_features, M = tokens, B = ceil(K / block_size). The Triton launchers in
`bigq_kernels` have the same names and arguments. Tests compare them with these functions: products within an error
budget, and everything else bit for bit. Sources: QLoRA (arXiv 2305.14314) for NF4 and double quantization, LLM.int8()
(arXiv 2208.07339) for int8.

Arguments that are scales are float32, or int32 of the same bits, which no cast of a model's floating-point tensors
changes. Results that are scales are float32. Tensors that do not fit together raise UnsupportedError
(`bigq.ops.checks`).
"""

from functools import cache
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from bigq.ops.checks import (
    NESTED_BLOCK_SIZE,
    as_floats,
    check_dequantize_4bit,
    check_dequantize_absmax,
    check_dequantize_int8,
    check_grouped_linear_4bit,
    check_grouped_linear_4bit_backward,
    check_grouped_linear_int8,
    check_grouped_linear_int8_backward,
    check_grouped_matmul,
    check_linear_4bit,
    check_linear_int8,
    check_routed_linear_4bit,
    check_routed_linear_int8,
)
from bigq.ops.code_tables import CODES, bucket, row_chunks, tables_of
from bigq.ops.expert_slots import assign_slots, fill_slots
from bigq.ops.routes import order_by_weight, rows_of_weights
from bigq.ops.row_steps import dot_rows, gated, gated_backward, sort_rows, sum_rows, take_rows
from bigq.ops.scale_search import encode_scaled_4bit, search_scales_4bit

__all__ = [
    "CODES",
    "NESTED_BLOCK_SIZE",
    "assign_slots",
    "dequantize_4bit",
    "dequantize_absmax",
    "dequantize_int8",
    "dot_rows",
    "encode_scaled_4bit",
    "fill_slots",
    "gated",
    "gated_backward",
    "grouped_linear_4bit",
    "grouped_linear_4bit_backward",
    "grouped_linear_int8",
    "grouped_linear_int8_backward",
    "grouped_matmul",
    "linear_4bit",
    "linear_4bit_backward",
    "linear_int8",
    "linear_int8_backward",
    "nested_code",
    "quantize_4bit",
    "quantize_absmax",
    "quantize_int8",
    "routed_linear_4bit",
    "routed_linear_int8",
    "search_scales_4bit",
    "sort_rows",
    "sum_rows",
    "take_rows",
]

_EXACT_K = 1024  # 1024 * 127 * 127 < 2**24: an int8 product of this depth is exact in float32


@cache
def nested_code(device: torch.device) -> Tensor:
    """The 256-entry signed dynamic map of the second quantization level, ascending, float32."""
    positive = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32, device="cpu")
        positive.append(10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0))
    magnitudes = torch.cat(positive)
    ends = torch.tensor([0.0, 1.0], device="cpu")
    return torch.cat([magnitudes, -magnitudes, ends]).sort().values.to(device)


def _scale_blocks(values: Tensor, absmax: Tensor, block_size: int, out: Tensor) -> None:
    """out [N, K] = values [N, K] times the scale of their block, absmax [N, B], in float32 and rounded once."""
    rows, columns = values.shape
    blocks = absmax.shape[1]
    if columns == blocks * block_size:
        shape = rows, blocks, block_size
        torch.mul(values.view(shape), absmax[:, :, None], out=out.view(shape))
        return
    padded = F.pad(values, (0, blocks * block_size - columns))
    out.copy_((padded.view(rows, blocks, block_size) * absmax[:, :, None]).view(rows, -1)[:, :columns])


def quantize_4bit(weight: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize a [N, K] float weight to 4-bit codes in blocks along each row.

    Returns:
        packed uint8 [N, ceil(K/2)], element 2i in the high nibble and an odd K padded with the code of 0.0; and
        absmax float32 [N, B], which is inf for a block that holds NaN or Inf (its codes mean nothing).
    """
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    boundaries, bucket_code, _ = tables_of(quant_type, weight.device)
    packed = torch.empty(rows, -(-columns // 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(rows, blocks, dtype=torch.float32, device=weight.device)
    if not weight.numel():
        return packed, absmax
    for start, stop in row_chunks(rows, columns):
        x = F.pad(weight[start:stop].float().contiguous(), (0, blocks * block_size - columns))
        x = x.view(-1, blocks, block_size)
        scale = torch.nan_to_num(x.abs().amax(dim=2), nan=float("inf"), posinf=float("inf"))
        # The smallest normal float keeps 1/absmax finite; below it a block loses precision, and zeros encode 0.0.
        scaled = x * scale.clamp_min(torch.finfo(torch.float32).tiny).reciprocal()[:, :, None]
        codes = bucket_code[bucket(scaled, boundaries).int()].view(stop - start, -1)
        high, low = codes[:, 0:columns:2], codes[:, 1 : columns + 1 : 2]
        packed[start:stop] = (high << 4) | low
        absmax[start:stop] = scale
    return packed, absmax


def dequantize_4bit(
    weight: Tensor, absmax: Tensor, quant_type: str, block_size: int, in_features: int | None, dtype: torch.dtype
) -> Tensor:
    """Undo `quantize_4bit`: code * float32 absmax, rounded once to `dtype`; uint8 [N, ceil(K/2)] -> [N, K].

    If in_features is None, K is even.
    """
    in_features = 2 * weight.shape[1] if in_features is None else in_features
    check_dequantize_4bit(weight, absmax, None, None, block_size, in_features)
    absmax = as_floats(absmax)
    rows = weight.shape[0]
    _, _, pairs = tables_of(quant_type, weight.device)
    out = torch.empty(rows, in_features, dtype=dtype, device=weight.device)
    if not out.numel():
        return out
    for start, stop in row_chunks(rows, in_features):
        # One 8-byte value a byte, by index_select: 7 times as fast as indexing rows of two.
        values = pairs.index_select(0, weight[start:stop].flatten().int()).view(torch.float32)
        values = values.view(stop - start, -1)[:, :in_features]
        _scale_blocks(values, absmax[start:stop], block_size, out[start:stop])
    return out


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the scales themselves (double quantization), in flat blocks of 256 around their mean.

    Returns:
        codes uint8 of absmax's shape, indices into `nested_code`, nearest value, a tie to the even index;
        nested_absmax float32 [ceil(numel / 256)]; nested_offset float32 [1], the mean.
    """
    flat = as_floats(absmax).flatten()
    offset = flat.mean() if flat.numel() else flat.new_zeros(())
    blocks = -(-flat.numel() // NESTED_BLOCK_SIZE)
    centred = F.pad(flat - offset, (0, blocks * NESTED_BLOCK_SIZE - flat.numel())).view(blocks, NESTED_BLOCK_SIZE)
    nested_absmax = centred.abs().amax(dim=1) if blocks else flat.new_zeros(0)
    scaled = centred * nested_absmax.clamp_min(torch.finfo(torch.float32).tiny).reciprocal()[:, None]
    code = nested_code(absmax.device)
    midpoints = (code[:-1] + code[1:]) * 0.5
    codes = torch.bucketize(scaled, midpoints, out_int32=True)  # a tie goes down...
    tie = scaled == midpoints[codes.clamp_max(254)]
    codes = codes + (tie & (codes % 2 == 1)).int()  # ...unless the index below is odd
    codes = codes.to(torch.uint8).flatten()[: flat.numel()].view(absmax.shape)
    return codes, nested_absmax, offset.reshape(1)


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """Undo `quantize_absmax`: code * nested_absmax, rounded, + nested_offset, rounded; float32 of codes' shape."""
    check_dequantize_absmax(codes, nested_absmax, nested_offset)
    scale = as_floats(nested_absmax).repeat_interleave(NESTED_BLOCK_SIZE)[: codes.numel()].view(codes.shape)
    values = nested_code(codes.device).index_select(0, codes.flatten().int()).view(codes.shape)
    return values * scale + as_floats(nested_offset)


def linear_4bit(
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
    """x [..., K] times the transposed 4-bit weight, plus bias [N], in x's dtype.

    weight is uint8 [N, ceil(K/2)], absmax [N, B], uint8 when nested_absmax [ceil(N*B/256)] and nested_offset [1] are
    given. If in_features is given, K has to equal it: packed weights of an odd K and of K + 1 have the same shape. The
    weight is dequantized a few rows at a time, so that they stay in the cache.
    """
    check_linear_4bit(x, weight, absmax, bias, nested_absmax, nested_offset, block_size, in_features)
    if nested_absmax is not None and nested_offset is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, nested_offset)
    bias = None if bias is None else bias.to(x.dtype)
    out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device)
    product_dtype = x.dtype if _multiplies(x.dtype, x.device) else torch.float32
    x_product = x.to(product_dtype)
    for start, stop in row_chunks(weight.shape[0], x.shape[-1]):
        rows = slice(start, stop)
        dense = dequantize_4bit(weight[rows], absmax[rows], quant_type, block_size, x.shape[-1], x.dtype)
        part = F.linear(x_product, dense.to(product_dtype), None if bias is None else bias[rows].to(product_dtype))
        out[..., rows] = part
    return out


def grouped_linear_4bit(
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
    """x [S, K] times a stack of transposed 4-bit weights [E, N, K], each row by its own, plus bias [E, N]: [S, N].

    Weight e multiplies the rows from stops[e - 1] (0 for the first) up to stops[e]. Rows after the last give zeros.
    The stack is one matrix [E * N, K] to double quantization.
    """
    check_grouped_linear_4bit(x, stops, weight, absmax, bias, nested_absmax, nested_offset, block_size, in_features)
    if nested_absmax is not None and nested_offset is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, nested_offset)
    out = torch.zeros(x.shape[0], weight.shape[1], dtype=x.dtype, device=x.device)
    for e, rows in rows_of_weights(stops):
        own = None if bias is None else bias[e]
        out[rows] = linear_4bit(x[rows], weight[e], absmax[e], own, None, None, quant_type, block_size)
    return out


def grouped_linear_4bit_backward(
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
    """The gradient of x in `grouped_linear_4bit`: grad [S, N] times the weights [E, N, K], each row by its own: [S, K].

    The weight of each expert is dequantized on its own, if it has rows. Rows after the last of stops give zeros.
    in_features: K. None: K is even.
    """
    k = 2 * weight.shape[-1] if in_features is None else in_features
    nested = (nested_absmax, nested_offset)
    check_grouped_linear_4bit_backward(grad, stops, weight, absmax, *nested, block_size, k)
    if nested_absmax is not None and nested_offset is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, nested_offset)
    out = grad.new_zeros(grad.shape[0], k)
    for e, rows in rows_of_weights(stops):
        out[rows] = grad[rows] @ dequantize_4bit(weight[e], absmax[e], quant_type, block_size, k, grad.dtype)
    return out


def routed_linear_4bit(
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
    """Row i of [S, N]: row i // (S / M) of x [M, K] times the transposed weight ids[i] of [E, N, K], plus its bias.

    A row whose id is no weight's gives zeros. ids is int32 or int64 [S]; S is a multiple of M. `weights` says of how
    many weights these are a part. It chooses kernels, and here changes nothing.
    """
    check_routed_linear_4bit(x, ids, weight, absmax, bias, nested_absmax, nested_offset, block_size, in_features)
    order, stops = order_by_weight(ids, weight.shape[0])
    sorted_x = x[order // (ids.shape[0] // max(x.shape[0], 1))]
    nested = (nested_absmax, nested_offset)
    out = grouped_linear_4bit(sorted_x, stops, weight, absmax, bias, *nested, quant_type, block_size)
    return torch.empty_like(out).index_copy_(0, order, out)


def grouped_matmul(x: Tensor, stops: Tensor, dense: Tensor) -> Tensor:
    """x [S, K] times dense [E, K, N], each row by its own as in `grouped_linear_4bit`: [S, N], in x's dtype."""
    check_grouped_matmul(x, stops, dense)
    out = x.new_zeros(x.shape[0], dense.shape[-1])
    for e, rows in rows_of_weights(stops):
        out[rows] = x[rows] @ dense[e]
    return out


@cache
def _multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has instructions for products in dtype: in float32 others are 5 times as fast, same error."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if name is None or device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return True
    has = torch.cpu.get_capabilities()
    return has.get("architecture") != "x86_64" or any(has.get(f"{unit}_{name}", False) for unit in ("amx", "avx512"))


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a [N, K] float weight to int8 with one scale a row.

    Returns:
        codes int8 [N, K], round-half-even of weight * (127 / absmax); absmax float32 [N, 1], inf for a row that holds
        NaN or Inf. A zero row is all zeros.
    """
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(rows, 1, dtype=torch.float32, device=weight.device)
    for start, stop in row_chunks(rows, columns):
        x = weight[start:stop].float()
        scale = x.abs().amax(dim=1, keepdim=True) if columns else x.new_zeros(stop - start, 1)
        scale = torch.nan_to_num(scale, nan=float("inf"), posinf=float("inf"))
        codes[start:stop] = _to_int8(x, scale)
        absmax[start:stop] = scale
    return codes, absmax


def _to_int8(x: Tensor, absmax: Tensor) -> Tensor:
    # 127 / 2**-119 is finite in float32; below that a row is zero to every consumer of its scale.
    inverse = absmax.clamp_min(2.0**-119).reciprocal() * 127.0  # two roundings, as bitsandbytes' CPU path has it
    return torch.nan_to_num(x * inverse, nan=0.0).round().clamp(-127, 127).to(torch.int8)


def dequantize_int8(weight: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `quantize_int8`: code * absmax, rounded, * (1/127), rounded, then rounded to `dtype`; [N, K]."""
    check_dequantize_int8(weight, absmax)
    absmax = as_floats(absmax)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for start, stop in row_chunks(*weight.shape):
        out[start:stop] = weight[start:stop].float() * absmax[start:stop] * (1.0 / 127.0)
    return out


def linear_4bit_backward(
    grad: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int,
) -> Tensor:
    """The gradient of x in `linear_4bit`: grad [..., N] times the dequantized weight [N, K], in grad's dtype."""
    if nested_absmax is not None and nested_offset is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, nested_offset)
    return grad @ dequantize_4bit(weight, absmax, quant_type, block_size, in_features, grad.dtype)


def linear_int8_backward(grad: Tensor, weight: Tensor, absmax: Tensor, bias: None, threshold: float) -> Tensor:
    """The gradient of x in `linear_int8`, where that of rounding x to int8 is 1 (straight-through estimator)."""
    return grad @ dequantize_int8(weight, absmax, grad.dtype)


def linear_int8(x: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """LLM.int8(): x [..., K] times the transposed int8 weight [N, K], plus bias [N], in x's dtype; absmax is [N, 1].

    A column of x with any |value| >= threshold is an outlier: it is multiplied in x's dtype by the dequantized weight
    column. All other columns are quantized to int8, with one scale for each row of x, taken over the elements below the
    threshold, and multiplied in integers. threshold 0 means no outliers.
    """
    check_linear_int8(x, weight, absmax, bias)
    rows = x.reshape(prod(x.shape[:-1]), x.shape[-1])  # not -1, which an empty x leaves undecided
    tokens = _int8_tokens(rows, threshold)
    result = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device)  # autograd refuses a view
    result.view(len(rows), weight.shape[0]).copy_(_int8_product(tokens, slice(None), weight, absmax, bias))
    return result


def grouped_linear_int8(
    x: Tensor, stops: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    """LLM.int8(): x [S, K] times a stack of transposed int8 weights [E, N, K], each row by its own, plus bias [E, N].

    Weight e multiplies the rows from stops[e - 1] (0 for the first) up to stops[e]. Rows after the last give zeros.
    A column is an outlier if any row of x has |value| >= threshold in it. So which columns are does not depend on how
    the rows are spread over weights. absmax is [E, N, 1].
    """
    check_grouped_linear_int8(x, stops, weight, absmax, bias)
    out, tokens = x.new_zeros(x.shape[0], weight.shape[1]), _int8_tokens(x, threshold)
    for e, rows in rows_of_weights(stops):
        own = None if bias is None else bias[e]
        out[rows] = _int8_product(tokens, rows, weight[e], absmax[e], own)
    return out


def grouped_linear_int8_backward(grad: Tensor, stops: Tensor, weight: Tensor, absmax: Tensor) -> Tensor:
    """The gradient of x in `grouped_linear_int8`: grad [S, N] times the weights [E, N, K], each row by its own: [S, K].

    The weight of each expert is dequantized on its own, if it has rows. Rows after the last of stops give zeros.
    """
    check_grouped_linear_int8_backward(grad, stops, weight, absmax)
    out = grad.new_zeros(grad.shape[0], weight.shape[2])
    for e, rows in rows_of_weights(stops):
        out[rows] = grad[rows] @ dequantize_int8(weight[e], absmax[e], grad.dtype)
    return out


def routed_linear_int8(
    x: Tensor, ids: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    """Row i of [S, N]: row i // (S / M) of x [M, K] times the transposed weight ids[i] of [E, N, K], plus its bias.

    A row whose id is no weight's gives zeros. Outlier columns are those of `grouped_linear_int8`. ids is int32 or int64
    [S]; S is a multiple of M.
    """
    check_routed_linear_int8(x, ids, weight, absmax, bias)
    order, stops = order_by_weight(ids, weight.shape[0])
    out = grouped_linear_int8(x[order // (ids.shape[0] // max(x.shape[0], 1))], stops, weight, absmax, bias, threshold)
    return torch.empty_like(out).index_copy_(0, order, out)


def _int8_tokens(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [M, K], its int8 codes and their scales [M, 1], and whether each column is an outlier: its codes are 0."""
    outlier = x.abs() >= threshold if threshold > 0 else torch.zeros_like(x, dtype=torch.bool)
    column = outlier.any(dim=0)
    regular = x.float().masked_fill(outlier, 0.0)
    scale = regular.abs().amax(dim=1, keepdim=True) if x.numel() else regular.new_zeros(x.shape[0], 1)
    return x, _to_int8(regular, scale).masked_fill(column, 0), scale, column


def _int8_product(
    tokens: tuple[Tensor, Tensor, Tensor, Tensor], rows: slice, weight: Tensor, absmax: Tensor, bias: Tensor | None
) -> Tensor:
    """`rows` of `_int8_tokens` times the transposed weight [N, K], plus bias [N], not yet rounded to x's dtype."""
    x, codes, scale, column = tokens
    x, codes, scale, absmax = x[rows], codes[rows], scale[rows], as_floats(absmax)
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[-1], _EXACT_K):
        part = slice(start, start + _EXACT_K)
        total += (codes[:, part].float() @ weight[:, part].float().T).int()
    out = total.float() * (scale * absmax.T) * (1.0 / (127.0 * 127.0))
    columns = column.nonzero().flatten()  # the number is known on the CPU; the kernels need static shapes
    if columns.numel():
        out = out + x[:, columns] @ dequantize_int8(weight[:, columns], absmax, x.dtype).T
    return out if bias is None else out + bias.float()
