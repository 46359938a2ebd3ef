"""The kernel of one and two tokens: every way to lay K over threads and N over programs, and what its integers cost."""

from itertools import product

import pytest
import torch

from bigq.ops import reference
from bigq_kernels.block4.configs import MAX_DP4A_K, Dp4aConfig, dp4a_config
from bigq_kernels.block4.dp4a import linear_4bit_dp4a
from bigq_kernels.block4.linear import linear_4bit
from bigq_kernels.gpu import Gpu
from linear_cases import packed4, quantized_4bit

BUDGET = 4e-4  # a rounding to bfloat16 makes 1.6e-3


def quantized(n, k, device, quant_type="nf4", block_size=64):
    """(a Packed4, its dequantized weight in float64)."""
    stored, dense = quantized_4bit(n, k, quant_type, block_size, False, device)
    return packed4(stored, quant_type, block_size), dense


def multiply(x, packed, config=None):
    """Output in float32, so that the kernel's own error shows; NaN where it writes nothing."""
    (m, k), n = x.shape, packed.weight.shape[0]
    out = torch.full((m, n), torch.nan, device=x.device)
    linear_4bit_dp4a(x, packed, None, out, config or dp4a_config(Gpu.of(x.device), m, n, k))
    return out


def relative_error(out, x, dense):
    """Of what outputs of random signs would be: the outputs themselves are few, and may be small by chance."""
    typical = x.double().norm() * dense.norm() / x.shape[1] ** 0.5
    return ((out.double() - x.double() @ dense.T).norm() / typical).item()


ONE, TWO, SMALL, LARGE = (1, "nf4", 64), (2, "nf4", 64), (1, "fp4", 32), (2, "nf4", 4096)


@pytest.mark.parametrize(
    "k, given",
    [
        *product([32, 96, 1024], [ONE, TWO, SMALL, LARGE]),
        *[(4128, TWO), (4128, SMALL), (11008, ONE), (11008, LARGE), (14336, TWO), (28672, SMALL), (MAX_DP4A_K, ONE)],
    ],
    ids=str,
)
def test_integers_cost_a_quarter_of_a_rounding_to_bfloat16(k, given, device):
    m, quant_type, block_size = given
    x = torch.randn(m, k, device=device).half()
    packed, dense = quantized(5, k, device, quant_type, block_size)
    assert relative_error(multiply(x, packed), x, dense) < BUDGET


@pytest.mark.parametrize("n", [1, 3, 13])
@pytest.mark.parametrize(
    "m, block_n, blocks, warps", [(1, 1, 9, 1), (1, 2, 3, 2), (2, 4, 1, 4), (2, 4, 2, 1), (2, 8, 1, 2)]
)
def test_every_row_is_right_however_rows_are_shared(block_n, blocks, warps, n, m, device):
    x = torch.randn(m, 1056, device=device).half()
    packed, dense = quantized(n, 1056, device)
    config = Dp4aConfig(block_n=block_n, blocks=blocks, warps=warps, registers=255)
    assert relative_error(multiply(x, packed, config), x, dense) < BUDGET


def test_a_row_has_the_same_bits_in_any_block(device):
    x = torch.randn(1, 512, device=device).half()
    packed, _ = quantized(23, 512, device)
    config = Dp4aConfig(block_n=4, blocks=2, warps=1, registers=255)
    together = multiply(x, packed, config)
    for row in (0, 7, 8, 19, 22):
        below = packed._replace(weight=packed.weight[row:], absmax=packed.absmax[row:])
        assert torch.equal(multiply(x, below, config)[:, 0], together[:, row])


def test_each_chunk_of_a_token_has_its_own_scale(device):
    """Large elements meet code values of zero: what is left of the small ones is as exact as ever."""
    dense = torch.randn(6, 128, device=device)
    dense[:, 32:64] = 0
    weight, absmax = reference.quantize_4bit(dense, "nf4", 64)
    packed = packed4((weight, absmax, None, None))
    exact = reference.dequantize_4bit(weight, absmax, "nf4", 64, 128, torch.float32).double()
    x = torch.randn(1, 128, device=device)
    x[:, 32:64] *= 1e7
    x = (x / 1e3).half()
    assert relative_error(multiply(x, packed), x, exact) < BUDGET


@pytest.mark.parametrize("value", [0.0, 6e-8, 65504.0], ids=["zero", "smallest", "largest"])
def test_tokens_of_one_value(value, device):
    packed, dense = quantized(6, 320, device)
    x = torch.full((2, 320), value, device=device).half()
    x[1] = -x[0]
    out = multiply(x, packed)
    assert torch.equal(out[0], -out[1])
    if value == 0.0:
        assert torch.equal(out, torch.zeros_like(out))
    else:
        assert relative_error(out, x, dense) < BUDGET


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 1055], ids=["first-chunk", "last-chunk"])
def test_nan_and_inf_make_all_outputs_of_their_token_nan(column, value, device):
    packed, _ = quantized(9, 1056, device)
    x = torch.randn(2, 1056, device=device).half()
    x[1, column] = value
    out = multiply(x, packed)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_a_longer_k_takes_another_kernel(device):
    k = 4096 + 64  # the most of two tokens is 4096
    x = torch.randn(2, k, device=device).half()
    packed, dense = quantized(3, k, device)
    out = linear_4bit(x, packed.weight, packed.absmax, None, None, None, "nf4", 64)
    assert relative_error(out, x, dense) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("n, k", [(4096, 4096), (5000, 4128), (4096, 14336), (1000, 28672), (300, MAX_DP4A_K)])
def test_repeats_bit_for_bit_beside_itself(n, k, m, device):
    """Launches follow one another without a pause, so that each starts before the one before has ended."""
    packed, _ = quantized(n, k, device)
    x = torch.randn(m, k, device=device).bfloat16()
    config = dp4a_config(Gpu.of(device), m, n, k)
    outs = [x.new_full((m, n), torch.nan) for _ in range(100)]
    for out in outs:
        linear_4bit_dp4a(x, packed, None, out, config)
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert outs[0].isfinite().all()


@pytest.mark.gpu
def test_a_chain_of_launches_that_start_early_waits_for_its_tokens(device):
    weight, absmax = reference.quantize_4bit(torch.randn(4096, 4096, device=device) / 64, "nf4", 64)  # keeps the norm
    x = torch.randn(1, 4096, device=device).bfloat16()

    def chain(waits):
        y = x
        for _ in range(100):
            y = linear_4bit(y, weight, absmax, None, None, None, "nf4", 64)
            if waits:
                torch.cuda.synchronize()
        return y

    expected = chain(True)
    assert expected.isfinite().all()
    assert expected.norm() > x.norm() / 100
    assert all(torch.equal(chain(False), expected) for _ in range(20))
