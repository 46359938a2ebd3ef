"""Every quantize and dequantize launcher equals the specification bit for bit."""

import math

import pytest
import torch

from bigq.ops import code_tables, reference
from bigq_kernels.block4.absmax import dequantize_absmax, nested_code, quantize_absmax
from bigq_kernels.block4.dequantize import dequantize_4bit
from bigq_kernels.block4.quantize import quantize_4bit
from bigq_kernels.int8.dequantize import dequantize_int8
from bigq_kernels.int8.quantize import quantize_int8

QUANT_TYPES = ["nf4", "fp4"]
IN_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The interpreter truncates float32 to bfloat16 instead of rounding.
OUT_DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SHAPES = [  # rows, columns, block size
    pytest.param(5, 64, 64, id="one-block-a-row"),
    pytest.param(3, 131, 32, id="odd-columns"),
    pytest.param(7, 1000, 128, id="partial-last-block"),
    pytest.param(2, 4097, 4096, id="largest-block"),
    pytest.param(3, 20, 64, id="row-shorter-than-a-block"),
    pytest.param(2, 1, 64, id="one-column"),
    pytest.param(0, 64, 64, id="no-rows"),
    pytest.param(700, 4096, 64, id="many-tiles", marks=pytest.mark.gpu),
    pytest.param(257, 4099, 64, id="many-odd-tiles", marks=pytest.mark.gpu),
]


def assert_same_bits(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype, a.device) == (e.shape, e.dtype, e.device)
        if a.is_floating_point():
            integer = torch.int32 if a.dtype == torch.float32 else torch.int16
            a, e = a.contiguous().view(integer), e.contiguous().view(integer)
        assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", IN_DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("rows, columns, block_size", SHAPES)
def test_quantize_4bit(rows, columns, block_size, quant_type, dtype, device):
    weight = torch.randn(rows, columns, device=device).to(dtype)
    assert_same_bits(
        quantize_4bit(weight, quant_type, block_size), reference.quantize_4bit(weight, quant_type, block_size)
    )


def test_4bit_without_columns(device):
    packed, absmax = quantize_4bit(torch.randn(3, 0, device=device), "nf4", 64)
    assert (packed.shape, absmax.shape) == ((3, 0), (3, 0))
    assert dequantize_4bit(packed, absmax, "nf4", 64, 0, torch.float16).shape == (3, 0)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_quantize_4bit_on_every_boundary_and_its_neighbours(quant_type, device):
    if quant_type == "nf4":
        boundaries = torch.tensor(code_tables.NF4_BOUNDARIES)
    else:
        magnitudes = torch.tensor(code_tables.FP4_MAGNITUDE_BOUNDARIES)
        boundaries = torch.cat([magnitudes, -magnitudes, torch.zeros(1)])
    up, down = (torch.nextafter(boundaries, torch.full_like(boundaries, to)) for to in (math.inf, -math.inf))
    block = torch.cat([boundaries, up, down, torch.tensor([-0.0, 1.0])])
    weight = torch.zeros(3, 64)
    for row, scale in enumerate((1.0, 2.0**40, 2.0**-100)):  # powers of two keep the ties exact
        weight[row, : block.numel()] = block * scale
    weight = weight.to(device)
    assert_same_bits(quantize_4bit(weight, quant_type, 64), reference.quantize_4bit(weight, quant_type, 64))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_quantize_4bit_of_zero_tiny_and_huge_blocks(quant_type, device):
    scale = torch.tensor([0.0, 1e-45, 1e-40, 2.0**-126, 1e-30, 1e30, 3e38], device=device)
    weight = (torch.rand(7, 96, device=device) * 2 - 1) * scale[:, None]
    assert_same_bits(quantize_4bit(weight, quant_type, 32), reference.quantize_4bit(weight, quant_type, 32))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", IN_DTYPES, ids=str)
def test_a_block_with_nan_or_inf_has_infinite_absmax(bad, dtype, device):
    weight = torch.randn(2, 192, device=device).to(dtype)
    weight[1, 70] = bad
    packed, absmax = quantize_4bit(weight, "nf4", 64)
    expected_packed, expected_absmax = reference.quantize_4bit(weight, "nf4", 64)
    assert absmax[1, 1] == math.inf
    assert_same_bits([absmax], [expected_absmax])
    finite = expected_absmax.isfinite().repeat_interleave(32, dim=1)
    assert torch.equal(packed[finite], expected_packed[finite])


def test_quantize_4bit_of_a_view(device):
    weight = torch.randn(130, 9, device=device)
    assert_same_bits(quantize_4bit(weight.T, "nf4", 64), reference.quantize_4bit(weight.T, "nf4", 64))
    assert_same_bits(quantize_4bit(weight[::2, 1:], "nf4", 32), reference.quantize_4bit(weight[::2, 1:], "nf4", 32))


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("rows, columns, block_size", SHAPES)
def test_dequantize_4bit(rows, columns, block_size, quant_type, dtype, device):
    weight = torch.randint(0, 256, (rows, -(-columns // 2)), dtype=torch.uint8, device=device)
    absmax = torch.randn(rows, -(-columns // block_size), device=device)
    args = (weight, absmax, quant_type, block_size, columns, dtype)
    assert_same_bits([dequantize_4bit(*args)], [reference.dequantize_4bit(*args)])


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("rows, columns, block_size", SHAPES)
def test_dequantize_4bit_of_nested_absmax(rows, columns, block_size, dtype, device):
    weight = torch.randint(0, 256, (rows, -(-columns // 2)), dtype=torch.uint8, device=device)
    codes, absmax, offset = quantize_absmax(torch.randn(rows, -(-columns // block_size), device=device))
    nested = (absmax, offset, nested_code(weight.device))
    expected = reference.dequantize_absmax(codes, absmax, offset)
    expected = reference.dequantize_4bit(weight, expected, "nf4", block_size, columns, dtype)
    assert_same_bits([dequantize_4bit(weight, codes, "nf4", block_size, columns, dtype, nested)], [expected])


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("rows, columns, block_size", SHAPES)
def test_dequantize_4bit_of_the_bits_of_absmax(rows, columns, block_size, quant_type, dtype, device):
    weight = torch.randint(0, 256, (rows, -(-columns // 2)), dtype=torch.uint8, device=device)
    absmax = torch.randn(rows, -(-columns // block_size), device=device)
    rest = (quant_type, block_size, columns, dtype)
    expected = [dequantize_4bit(weight, absmax, *rest)]
    assert_same_bits([dequantize_4bit(weight, absmax.view(torch.int32), *rest)], expected)
    codes, nested, offset = quantize_absmax(absmax)
    code = nested_code(weight.device)
    expected = [dequantize_4bit(weight, codes, *rest, (nested, offset, code))]
    bits = (nested.view(torch.int32), offset.view(torch.int32), code)
    assert_same_bits([dequantize_4bit(weight, codes, *rest, bits)], expected)


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_dequantize_4bit_of_every_byte(quant_type, dtype, device):
    weight = torch.arange(256, dtype=torch.uint8, device=device).view(1, 256).repeat(3, 1)
    absmax = torch.tensor([[1.0], [1e-3], [1000.1]], device=device).repeat(1, 8)
    args = (weight, absmax, quant_type, 64, 512, dtype)
    assert_same_bits([dequantize_4bit(*args)], [reference.dequantize_4bit(*args)])


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy, in the interpreter
def test_scales_beyond_half_precision_give_inf_of_their_sign(device):
    weight = torch.arange(256, dtype=torch.uint8, device=device).view(1, 256).repeat(2, 1)
    absmax = torch.tensor([[1e5], [-1e5]], device=device).repeat(1, 8)
    args = (weight, absmax, "nf4", 64, 512, torch.float16)
    dense = dequantize_4bit(*args)
    assert_same_bits([dense], [reference.dequantize_4bit(*args)])
    assert dense[0].max() == -dense[0].min() == math.inf
    assert torch.equal(dense[1], -dense[0])


@pytest.mark.parametrize("shape", [(7, 211), (256,), (3, 0), (1,)], ids=str)
def test_quantize_absmax_and_back_of_the_bits_of_scales(shape, device):
    absmax = torch.randn(shape, device=device)
    stored = quantize_absmax(absmax)
    assert_same_bits(quantize_absmax(absmax.view(torch.int32)), stored)
    codes, nested, offset = stored
    bits = (codes, nested.view(torch.int32), offset.view(torch.int32))
    assert_same_bits([dequantize_absmax(*bits)], [dequantize_absmax(*stored)])


def test_quantize_absmax_on_ties(device):
    code = reference.nested_code(torch.device("cpu"))
    midpoints = (code[:-1] + code[1:]) * 0.5
    up, down = (torch.nextafter(midpoints, torch.full_like(midpoints, to)) for to in (math.inf, -math.inf))
    for values in (midpoints, up, down):
        # A first block of 256 whose absmax is 1, and its mirror image, so that the mean is exactly 0.
        block = torch.cat([values, torch.ones(1)])
        absmax = torch.cat([block, -block]).to(device)
        if absmax.mean() != 0:
            absmax = absmax.sort().values
        assert_same_bits(quantize_absmax(absmax), reference.quantize_absmax(absmax))


def test_dequantize_absmax_of_every_code(device):
    codes = torch.arange(256, dtype=torch.uint8, device=device).repeat(2)
    nested, offset = torch.tensor([0.37, 11.3], device=device), torch.tensor([0.123], device=device)
    assert_same_bits([dequantize_absmax(codes, nested, offset)], [reference.dequantize_absmax(codes, nested, offset)])


ROWS = [
    pytest.param(5, 64, id="small"),
    pytest.param(2, 17000, id="more-than-a-tile"),
    pytest.param(3, 1, id="one-column"),
    pytest.param(0, 8, id="no-rows"),
    pytest.param(3, 0, id="no-columns"),
    pytest.param(3000, 4097, id="large", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("dtype", IN_DTYPES, ids=str)
@pytest.mark.parametrize("rows, columns", ROWS)
def test_quantize_int8(rows, columns, dtype, device):
    weight = torch.randn(rows, columns, device=device).to(dtype)
    assert_same_bits(quantize_int8(weight), reference.quantize_int8(weight))


def test_quantize_int8_rounds_ties_to_even(device):
    weight = torch.arange(-254, 255, device=device).float()[None] / 2  # absmax 127, so halves stay halves
    codes, absmax = quantize_int8(weight)
    assert_same_bits([codes, absmax], reference.quantize_int8(weight))
    assert torch.equal(codes[0], weight[0].round().to(torch.int8))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
def test_quantize_int8_of_extreme_rows(device):
    scale = torch.tensor([0.0, 1e-45, 2.0**-126, 2.0**-119, 1e-30, 3e38], device=device)
    weight = (torch.rand(6, 40, device=device) * 2 - 1) * scale[:, None]
    bad = torch.randn(3, 40, device=device)
    bad[:, 7] = torch.tensor([math.nan, math.inf, -math.inf], device=device)
    weight = torch.cat([weight, bad])
    assert_same_bits(quantize_int8(weight), reference.quantize_int8(weight))


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("rows, columns", ROWS)
def test_dequantize_int8(rows, columns, dtype, device):
    weight = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device)
    absmax = torch.rand(rows, 1, device=device)
    args = (weight, absmax, dtype)
    assert_same_bits([dequantize_int8(*args)], [reference.dequantize_int8(*args)])
    assert_same_bits([dequantize_int8(weight, absmax.view(torch.int32), dtype)], [dequantize_int8(*args)])


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements(device):
    rows, columns = 2**19 + 3, 4096
    weight = torch.randn(64, columns, device=device, dtype=torch.bfloat16).repeat(rows // 64 + 1, 1)[:rows]
    packed, absmax = quantize_4bit(weight, "nf4", 64)
    tail = slice(rows - 64, rows)
    assert_same_bits([packed[tail], absmax[tail]], reference.quantize_4bit(weight[tail], "nf4", 64))
    back = dequantize_4bit(packed, absmax, "nf4", 64, columns, torch.bfloat16)
    expected = reference.dequantize_4bit(packed[tail], absmax[tail], "nf4", 64, columns, torch.bfloat16)
    assert_same_bits([back[tail]], [expected])
    codes, scale = quantize_int8(weight)
    assert_same_bits([codes[tail], scale[tail]], reference.quantize_int8(weight[tail]))
    assert_same_bits(
        [dequantize_int8(codes, scale, torch.bfloat16)[tail]],
        [reference.dequantize_int8(codes[tail], scale[tail], torch.bfloat16)],
    )
