"""The kernel of stacks with wgmma: tiles, blocks and lengths of K, each row of x times its own, against float64."""

from itertools import accumulate

import pytest
import torch

from bigq.ops import reference
from bigq.testing import assert_within_budget
from bigq_kernels.block4.configs import WgmmaConfig
from bigq_kernels.block4.linear import launcher
from bigq_kernels.gpu import Gpu
from linear_cases import packed4, quantized_4bit

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("block_m", [32, 64])]
GROUPS = [0, 1, 31, 32, 33, 63, 64, 65, 0, 97, 130]  # rows of each weight
BEHIND = 3  # rows behind the last of these


@pytest.fixture
def wgmma(device, block_m):
    """A function (x, Packed4, bias, stops) -> [M, N]."""
    gpu = Gpu.of(device)
    if not gpu.gluon or gpu.capability != (9, 0):
        pytest.skip("another release of Triton, or no Hopper GPU")

    def run(x, packed, bias, stops):
        out = x.new_full((len(x), packed.weight.shape[1]), torch.nan)
        launcher("wgmma")(x, packed, bias, out, WgmmaConfig(block_m=block_m), stops)
        return out

    return run


def stack(e, n, k, device, quant_type="nf4", block_size=64, nested=False):
    """The tensors of a stack [e, n, k] and its exact weights [e, n, k]."""
    (weight, absmax, *scales), exact = quantized_4bit(e * n, k, quant_type, block_size, nested, device)
    return (weight.view(e, n, -1), absmax.view(e, n, -1), *scales), exact.view(e, n, k)


def stops_of(groups, device):
    return torch.tensor(list(accumulate(groups)), dtype=torch.int32, device=device)


@pytest.mark.parametrize(
    "quant_type, nested, dtype",
    [
        pytest.param("nf4", False, torch.bfloat16, id="nf4-bfloat16"),
        pytest.param("nf4", True, torch.bfloat16, id="nf4-nested-bfloat16"),
        pytest.param("fp4", False, torch.float16, id="fp4-float16"),
        pytest.param("fp4", True, torch.float16, id="fp4-nested-float16"),
    ],
)
@pytest.mark.parametrize(
    "n, k, block_size",
    [
        pytest.param(256, 4096, 64, id="whole-tiles"),
        pytest.param(203, 4352, 64, id="partial-tile-and-odd-steps"),
        pytest.param(5, 256, 64, id="one-step-of-less-than-a-tile"),
        pytest.param(200, 64, 64, id="less-than-a-step"),
        pytest.param(256, 1024, 128, id="block-128"),
        pytest.param(256, 4352, 4096, id="partial-block"),
        pytest.param(200, 4160, 64, id="partial-step"),
        pytest.param(200, 704, 128, id="partial-step-of-block-128"),
    ],
)
def test_tiles(n, k, block_size, quant_type, nested, dtype, wgmma, device):
    e, stops = len(GROUPS), stops_of(GROUPS, device)
    tensors, exact = stack(e, n, k, device, quant_type, block_size, nested)
    packed, bias = packed4(tensors, quant_type, block_size), torch.randn(e, n, device=device)
    x = torch.randn(sum(GROUPS) + BEHIND, k, device=device).to(dtype)
    expected = torch.zeros(len(x), n, dtype=torch.float64, device=device)
    for weight, (stop, rows) in enumerate(zip(stops.tolist(), GROUPS, strict=True)):
        here = slice(stop - rows, stop)
        expected[here] = x[here].double() @ exact[weight].T + bias[weight].double()
    weight, absmax, *scales = tensors
    baseline = reference.grouped_linear_4bit(x, stops, weight, absmax, bias, *scales, quant_type, block_size)
    actual = wgmma(x, packed, bias, stops)
    assert_within_budget(actual, expected, baseline)
    assert not actual[-BEHIND:].any()
    assert torch.equal(wgmma(x, packed, bias, stops), actual)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_scale_beyond_half_precision(sign, wgmma, device):
    """A float32 weight may have an absmax that float16 has not, and products that float16 has."""
    weight = torch.full((2, 128, 256), 0x88, dtype=torch.uint8, device=device)  # the least positive code
    absmax = torch.full((2, 128, 8), sign * 100000.0, device=device)
    x = torch.zeros(33, 512, device=device, dtype=torch.float16)
    x[:, 3] = 1
    out = wgmma(x, packed4((weight, absmax, None, None)), None, stops_of([20, 13], device))
    torch.testing.assert_close(out, torch.full_like(out, sign * 100000.0 * 0.07958029955625534), rtol=2e-3, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_row(value, wgmma, device):
    tensors, _ = stack(2, 200, 1024, device)
    x = torch.randn(40, 1024, device=device).bfloat16()
    x[1, 7] = value
    finite = wgmma(x, packed4(tensors), None, stops_of([30, 10], device)).isfinite().all(dim=1)
    assert not finite[1]
    assert finite.sum() == 39
