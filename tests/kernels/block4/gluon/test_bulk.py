"""The kernel of 17 and more tokens on Hopper: every shipped tile at shapes with partial tiles, against float64."""

import pytest
import torch

from bigq.ops import reference
from bigq.testing import assert_within_budget
from bigq_kernels.block4.bulk_config import tile_config
from bigq_kernels.block4.configs import BulkConfig
from bigq_kernels.block4.linear import launcher
from bigq_kernels.gpu import Gpu
from linear_cases import packed4, quantized_4bit

pytestmark = pytest.mark.gpu
TILES = {f"{m}-split-{split}": tile_config(m, split) for m in (32, 64, 128, 256) for split in (1, 3)}
TILES["32-without-halves"] = BulkConfig(block_m=32, split=1, stages=4, halves=1)


@pytest.fixture
def bulk(device):
    """A function (x, Packed4, bias, config) -> [M, N]."""
    gpu = Gpu.of(device)
    if not gpu.bulk:
        pytest.skip("another release of Triton, or no Hopper GPU")

    def run(x, packed, bias, config):
        out = x.new_full((len(x), len(packed.weight)), torch.nan)
        launcher("bulk")(x, packed, bias, out, config)
        return out

    return run


@pytest.mark.parametrize(
    "quant_type, nested, dtype",
    [
        pytest.param("nf4", False, torch.bfloat16, id="nf4-bfloat16"),
        pytest.param("nf4", True, torch.bfloat16, id="nf4-nested-bfloat16"),
        pytest.param("fp4", True, torch.float16, id="fp4-nested-float16"),
    ],
)
@pytest.mark.parametrize("config", TILES.values(), ids=TILES)
@pytest.mark.parametrize(
    "n, k, block_size",
    [
        pytest.param(1024, 4096, 64, id="whole-tiles"),
        pytest.param(1003, 4352, 64, id="partial-tile-and-odd-steps"),
        pytest.param(5, 256, 64, id="less-than-a-tile"),
        pytest.param(256, 1024, 128, id="block-128"),
        pytest.param(256, 4352, 4096, id="partial-block"),
        pytest.param(200, 4160, 64, id="partial-step"),
        pytest.param(200, 4416, 64, id="partial-step-of-the-other-half"),
    ],
)
def test_tiles(n, k, block_size, config, quant_type, nested, dtype, bulk, device):
    block_m = config.block_m
    quantized, dense = quantized_4bit(n, k, quant_type, block_size, nested, device)
    packed, bias = packed4(quantized, quant_type, block_size), torch.randn(n, device=device)
    # Each size of a tile that has a loop of its own, full and one more than full, alone and after a whole tile.
    quarter = block_m // 4
    for m in (1, quarter, quarter + 1, 2 * quarter, 3 * quarter, block_m - 1, block_m, block_m + 1, 2 * block_m - 1):
        x = torch.randn(m, k, device=device).to(dtype)
        actual = bulk(x, packed, bias, config)
        baseline = reference.linear_4bit(x, quantized[0], quantized[1], bias, *quantized[2:], quant_type, block_size)
        assert_within_budget(actual, x.double() @ dense.T + bias.double(), baseline)
        assert torch.equal(bulk(x, packed, bias, config), actual)


BOTH = pytest.mark.parametrize("config", [tile_config(64, 2), tile_config(128)], ids=["in-halves", "whole"])


@BOTH
@pytest.mark.parametrize("sign", [1, -1])
def test_a_scale_beyond_half_precision(sign, config, bulk, device):
    """A float32 weight may have an absmax that float16 has not, and products that float16 has."""
    weight = torch.full((128, 256), 0x88, dtype=torch.uint8, device=device)  # the least positive code
    absmax = torch.full((128, 8), sign * 100000.0, device=device)
    x = torch.zeros(33, 512, device=device, dtype=torch.float16)
    x[:, 3] = 1
    out = bulk(x, packed4((weight, absmax, None, None)), None, config)
    torch.testing.assert_close(out, torch.full_like(out, sign * 100000.0 * 0.07958029955625534), rtol=2e-3, atol=0)


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_row(value, config, bulk, device):
    quantized, _ = quantized_4bit(200, 1024, "nf4", 64, False, device)
    x = torch.randn(40, 1024, device=device).bfloat16()
    x[1, 7] = value
    finite = bulk(x, packed4(quantized), None, config).isfinite().all(dim=1)
    assert not finite[1]
    assert finite.sum() == 39
