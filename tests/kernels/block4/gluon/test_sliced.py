"""The kernel whose warps share K, in Gluon: tokens, slices, splits, blocks and dtypes, against float64 products."""

from itertools import product

import pytest
import torch

from bigq.ops import reference
from bigq.testing import assert_within_budget
from bigq_kernels.block4.choose import choose
from bigq_kernels.block4.configs import SlicedConfig
from bigq_kernels.block4.linear import linear_4bit
from bigq_kernels.gpu import Gpu
from bigq_kernels.tiles import ceil_div
from linear_cases import packed4, quantized_4bit

pytestmark = pytest.mark.gpu


def run(x, quantized, quant_type="nf4", block_size=64, bias=None, **changes):
    """The product by a configuration that holds all of K in as few splits as it can."""
    if not Gpu.of(x.device).gluon or Gpu.of(x.device).capability != (9, 0):
        pytest.skip("another release of Triton, or another GPU")
    from bigq_kernels.block4.gluon.sliced import linear_4bit_sliced  # not on all releases of Triton

    m, k = x.shape
    tile = {
        "block_m": 8 if m <= 8 else 16,
        "warps": 16,
        "quarters": 4,
        "covers": 1,
        "abreast": 1,
        "stages": 3,
        "flush": 2,
        "programs": 132,
    } | changes
    split = ceil_div(k, 64 * tile["quarters"] * tile["covers"] * (tile["warps"] // tile["abreast"]))
    config = SlicedConfig(**tile, split=split, registers=128 if tile["warps"] == 16 else 255)
    out = torch.full((m, len(quantized[0])), torch.nan, device=x.device, dtype=x.dtype)
    linear_4bit_sliced(x, packed4(quantized, quant_type, block_size), bias, out, config)
    return out


def check(x, n, quant_type="nf4", block_size=64, nested=False, bias=None, **config):
    quantized, dense = quantized_4bit(n, x.shape[1], quant_type, block_size, nested, x.device)
    exact = x.double() @ dense.T
    if bias is not None:
        exact = exact + bias.double()
    weight, absmax, *nested_tensors = quantized
    expected = reference.linear_4bit(x, weight, absmax, bias, *nested_tensors, quant_type, block_size)
    assert_within_budget(run(x, quantized, quant_type, block_size, bias, **config), exact, expected)


@pytest.mark.parametrize("m", [1, 2, 3, 8, 9, 16])
@pytest.mark.parametrize(
    "n, k",
    [
        pytest.param(1040, 4096, id="a-slice-a-warp"),
        pytest.param(48, 256, id="one-slice"),
        pytest.param(16, 3584, id="one-tile-and-idle-warps"),
        pytest.param(4624, 4352, id="two-splits"),
    ],
)
def test_shapes(n, k, m, device):
    bias = torch.randn(n, device=device)
    for quant_type, (nested, dtype) in product(
        ("nf4", "fp4"), ((False, torch.float16), (True, torch.bfloat16), (m % 2 == 0, torch.bfloat16))
    ):
        check(torch.randn(m, k, device=device).to(dtype), n, quant_type, nested=nested, bias=bias)


@pytest.mark.parametrize("nested", [False, True], ids=["absmax", "nested"])
@pytest.mark.parametrize("block_size", [64, 128, 4096])
@pytest.mark.parametrize("m", [1, 16])
def test_block_sizes(m, block_size, nested, device):
    check(torch.randn(m, 4096, device=device).bfloat16(), 208, block_size=block_size, nested=nested)


@pytest.mark.parametrize("m", [4, 16])
@pytest.mark.parametrize("k", [2048, 8192, 14336])
@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"warps": 8, "covers": 1}, id="8-warps"),
        pytest.param({"warps": 8, "covers": 2, "flush": 1, "stages": 4}, id="8-warps-of-two-slices"),
        pytest.param({"warps": 8, "covers": 1, "flush": 2, "stages": 2, "programs": 264}, id="two-stages"),
    ],
)
def test_slices_and_splits(config, k, m, device):
    check(torch.randn(m, k, device=device).bfloat16(), 1008, bias=torch.randn(1008, device=device), **config)


@pytest.mark.parametrize("k", [8192, 7168])
def test_two_slices_of_16_warps(k, device):
    check(torch.randn(7, k, device=device).bfloat16(), 1008, covers=2, flush=4)


@pytest.mark.parametrize("m", [1, 8, 16])
@pytest.mark.parametrize(
    "n, k, config",
    [
        pytest.param(1040, 2880, {"quarters": 3}, id="192-and-an-idle-warp"),
        pytest.param(48, 1536, {"quarters": 3, "warps": 8}, id="192-and-no-idle-warp"),
        pytest.param(1008, 5120, {"quarters": 3, "warps": 8, "covers": 2}, id="192-in-two-splits-of-two-slices"),
        pytest.param(1008, 8960, {"quarters": 3, "warps": 8}, id="192-in-six-splits"),
        pytest.param(48, 1440, {"quarters": 3, "warps": 8}, id="partial-slice-of-192"),
        pytest.param(48, 4512, {}, id="partial-slice-of-256-in-two-splits"),
        pytest.param(4640, 1024, {"warps": 8, "abreast": 2}, id="two-tiles-abreast"),
        pytest.param(128, 736, {"quarters": 3, "abreast": 4, "flush": 1}, id="four-abreast-and-a-partial-slice-of-192"),
        pytest.param(64, 2048, {"warps": 8, "abreast": 4, "flush": 1}, id="four-abreast-in-four-splits"),
    ],
)
def test_slices_of_192_partial_slices_and_tiles_abreast(n, k, config, m, device):
    bias = torch.randn(n, device=device)
    for quant_type, nested, dtype in (("nf4", False, torch.bfloat16), ("fp4", True, torch.float16)):
        check(torch.randn(m, k, device=device).to(dtype), n, quant_type, nested=nested, bias=bias, **config)


@pytest.mark.parametrize("block_size", [64, 128, 256])
def test_block_sizes_of_slices_of_192(block_size, device):
    check(torch.randn(4, 2304, device=device).bfloat16(), 208, block_size=block_size, quarters=3)


@pytest.mark.parametrize("m", [3, 16])
@pytest.mark.parametrize("programs, k", [(1, 4096), (2, 8192), (5, 4096), (62, 4096), (64, 8192), (132, 4096)])
def test_every_number_of_programs_repeats_bit_for_bit(m, programs, k, device):
    quantized, dense = quantized_4bit(1008, k, "nf4", 64, False, device)  # 63 tiles
    x = torch.randn(m, k, device=device).bfloat16()
    first = run(x, quantized, programs=programs)
    assert_within_budget(
        first, x.double() @ dense.T, reference.linear_4bit(x, *quantized[:2], None, None, None, "nf4", 64)
    )
    run(x.flip(1), quantized, programs=132)  # its partial sums are where the allocator puts the next call's
    assert all(torch.equal(run(x, quantized, programs=programs), first) for _ in range(20))


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 8])
def test_more_than_2_to_the_31_weights(m, device):
    n, k, tail = 2**19 + 64, 8192, 64  # 2**31 bytes of codes as well
    x = torch.randn(m, k, device=device).bfloat16()
    if choose(device, m, n, k, 64, x.dtype).way != "sliced":
        pytest.skip("another release of Triton, or another GPU")
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    absmax = torch.rand(n, k // 64, device=device)
    out = linear_4bit(x, packed, absmax, None, None, None, "nf4", 64)[:, -tail:]
    expected = reference.linear_4bit(x, packed[-tail:], absmax[-tail:], None, None, None, "nf4", 64)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=0.5)
