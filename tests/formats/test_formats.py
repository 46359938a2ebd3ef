"""Every format keeps the contract of `Format`: what it stores is what it says, and what it undoes is what it did."""

import pytest
import torch

from bigq import ConfigError, QuantizationConfig, UnsupportedError, dequantize_tensor, quantize_tensor
from bigq.formats import BLOCK_SIZES, FP4, NF4, Int8
from bigq.testing import check_format

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [
    NF4(),
    NF4(block_size=32, double_quant=True),
    FP4(block_size=128),
    FP4(block_size=4096, double_quant=True),
    Int8(),
]


def name(value):
    return "-".join(str(v) for v in value.describe().values()) if hasattr(value, "describe") else str(value)


@pytest.mark.parametrize("fmt", FORMATS, ids=name)
def test_it_keeps_the_contract(fmt):
    # int8 rounds x to 8 bits: absmax/127/sqrt(12) over a standard deviation of about absmax/3
    check_format(fmt, device=DEVICE, activation_error=0.008 if isinstance(fmt, Int8) else 0.0)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_bits_per_weight(block_size):
    spec = NF4(block_size=block_size).state_spec((64, 4096))
    bits = 8 * (spec["packed"].nbytes + spec["absmax"].nbytes) / (64 * 4096)
    assert bits == 4 + 32 / block_size


def test_a_3d_weight_is_its_matrices():
    weight = torch.randn(3, 4, 96, device=DEVICE)
    fmt = NF4()
    whole = fmt.quantize(weight)
    for index in range(3):
        part = fmt.quantize(weight[index])
        assert torch.equal(whole["packed"][index], part["packed"])
        assert torch.equal(whole["absmax"][index], part["absmax"])


@pytest.mark.parametrize("fmt", FORMATS, ids=name)
def test_some_matrices_of_a_stack_are_its_parts_by_matrix(fmt):
    """What an expert cache does: a stack of other matrices in another order is made of the bytes of each."""
    n, k = 64, 4096  # 64 scales or more a matrix, of blocks of 4096
    weight, chosen = torch.randn(4, n, k, device=DEVICE), [3, 1]
    fits = not getattr(fmt, "double_quant", False) or n * k // fmt.block_size % 256 == 0
    by_matrix = fmt.parts_by_matrix(tuple(weight.shape))
    assert (by_matrix is not None) is (fits and not isinstance(fmt, Int8))
    if by_matrix is None:
        return
    state, spec = fmt.quantize(weight), fmt.state_spec((2, n, k))
    assert {*by_matrix} == {*spec}
    part = {
        name: state[name].view(4, -1)[chosen].view(spec[name].shape) if is_own else state[name]
        for name, is_own in by_matrix.items()
    }
    dense = fmt.dequantize(state, (4, n, k), torch.float32)
    assert torch.equal(fmt.dequantize(part, (2, n, k), torch.float32), dense[chosen])


@pytest.mark.parametrize("shape", [(2, 3, 64), (2, 255, 64), (2, 128, 64)], ids=str)
def test_matrices_that_share_a_second_level_scale_have_no_parts_of_their_own(shape):
    assert NF4(double_quant=True).parts_by_matrix(shape) is None
    assert NF4(double_quant=True).parts_by_matrix((2, 256, 64)) is not None


@pytest.mark.parametrize("fmt", FORMATS, ids=name)
def test_a_transposed_weight_is_no_different(fmt):
    weight = torch.randn(100, 24, device=DEVICE).T
    assert not weight.is_contiguous()
    for key, tensor in fmt.quantize(weight).items():
        assert torch.equal(tensor, fmt.quantize(weight.contiguous())[key])


@pytest.mark.parametrize("fmt", FORMATS, ids=name)
def test_rows_that_are_quantized_apart_are_those_of_the_whole_weight(fmt):
    weight, apart = torch.randn(9, 70, device=DEVICE), fmt.row_format
    parts = [fmt.quantize_rows(weight[rows]).tensors for rows in (slice(0, 4), slice(4, 9))]
    spec = apart.state_spec((4, 70))
    assert {part: (tensor.shape, tensor.dtype) for part, tensor in parts[0].items()} == {
        part: (torch.Size(own.shape), own.dtype) for part, own in spec.items()
    }
    assert torch.equal(apart.quantize(weight[:4])["packed"], parts[0]["packed"])
    rows = {part: torch.cat([found[part] for found in parts]) for part in spec}
    whole = fmt.quantize(weight)
    finished = fmt.finish(rows, (9, 70))
    assert finished.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[part]) for part, tensor in finished.items())
    assert apart.row_format == apart


@pytest.mark.parametrize("fmt", FORMATS, ids=name)
def test_a_format_that_quantizes_row_by_row_measures_nothing(fmt):
    assert not fmt.measures
    with pytest.raises(UnsupportedError, match=f"'{fmt.name}' quantizes row by row"):
        fmt.measure(torch.ones(2, 64))


class TestQuantizeTensor:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("format_name", ["nf4", "fp4", "int8"])
    def test_round_trip(self, format_name, dtype):
        weight = torch.randn(16, 128, device=DEVICE).to(dtype)
        state = quantize_tensor(weight, QuantizationConfig(format_name))
        out = dequantize_tensor(state)
        assert (out.dtype, out.shape) == (dtype, weight.shape)
        assert (out - weight).norm() < 0.15 * weight.norm()
        assert dequantize_tensor(state, torch.float32).dtype == torch.float32
        assert state.nbytes < weight.numel() * (0.6 if format_name != "int8" else 1.1) + 200

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_nan_and_inf_are_refused(self, bad):
        with pytest.raises(ConfigError, match=r"shape \[2, 64\] holds NaN or Inf"):
            quantize_tensor(torch.full((2, 64), bad), QuantizationConfig("nf4"))

    def test_integers_are_refused(self):
        with pytest.raises(ConfigError, match=r"torch\.int32"):
            quantize_tensor(torch.zeros(2, 64, dtype=torch.int32), QuantizationConfig("nf4"))


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_31_elements():
    weight = torch.randn(1 << 16, (1 << 15) + 64, device="cuda", dtype=torch.bfloat16)
    for fmt in (NF4(), Int8()):
        state = fmt.quantize(weight)
        for rows in (slice(0, 2), slice(-2, None)):
            part = fmt.quantize(weight[rows])
            assert torch.equal(state["packed"][rows], part["packed"])
            out = fmt.dequantize(state, tuple(weight.shape), torch.bfloat16)[rows]
            assert torch.equal(out, fmt.dequantize(part, tuple(weight[rows].shape), torch.bfloat16))
        x = torch.randn(1, weight.shape[1], device="cuda", dtype=torch.bfloat16)
        tail = fmt.linear(x, fmt.quantize(weight[-64:]), None)
        out = fmt.linear(x, state, None)
        torch.testing.assert_close(out[:, -64:], tail, rtol=2e-2, atol=2.0)
