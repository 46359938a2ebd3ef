"""The kernel whose warps share K, with a stack of weights: each row of x times its own, against float64 products."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from bigq.ops import reference
from bigq.testing import assert_within_budget
from bigq_kernels.block4.configs import SlicedConfig
from bigq_kernels.gpu import Gpu
from linear_cases import packed4, quantized_4bit

pytestmark = pytest.mark.gpu

GROUPS = [0, 1, 8, 9, 16, 17, 0, 3, 40]  # rows of each weight
EIGHT_WARPS = SlicedConfig(block_m=8, warps=8, covers=1, split=1, stages=2, flush=2, programs=264, registers=128)
SIXTEEN_WARPS = replace(EIGHT_WARPS, warps=16, stages=3, programs=132)


def run(x, tensors, config, route, bias=None, quant_type="nf4", block_size=64):
    if not Gpu.of(x.device).gluon or Gpu.of(x.device).capability != (9, 0):
        pytest.skip("another release of Triton, or another GPU")
    from bigq_kernels.block4.gluon.sliced import linear_4bit_sliced  # not on all releases of Triton

    rows = len(route) if config.single else len(x)
    out = torch.full((rows, tensors[0].shape[1]), torch.nan, device=x.device, dtype=x.dtype)
    linear_4bit_sliced(x, packed4(tensors, quant_type, block_size), bias, out, config, route)
    return out


def stack(e, n, k, device, quant_type="nf4", block_size=64, nested=False):
    (weight, absmax, *scales), exact = quantized_4bit(e * n, k, quant_type, block_size, nested, device)
    return (weight.view(e, n, -1), absmax.view(e, n, -1), *scales), exact.view(e, n, k)


def by_weight(x, exact, ids, bias=None):
    """Row i of x times exact[ids[i]], and zeros if there is no such weight."""
    out = torch.zeros(len(x), exact.shape[1], dtype=x.dtype, device=x.device)
    for weight in range(len(exact)):
        rows = ids == weight
        out[rows] = x[rows] @ exact[weight].to(x.dtype).T
        if bias is not None:
            out[rows] += bias[weight].to(x.dtype)
    return out


def check(config, groups, n, k, device, dtype=torch.bfloat16, has_bias=True, behind=3, **format):
    """Sorted rows, of which the last `behind` have no weight."""
    e = len(groups)
    tensors, exact = stack(e, n, k, device, **format)
    stops = torch.tensor(list(accumulate(groups)), dtype=torch.int32, device=device)
    ids = torch.repeat_interleave(torch.arange(e + 1, device=device), torch.tensor([*groups, behind], device=device))
    x = torch.randn(len(ids), k, device=device).to(dtype)
    bias = torch.randn(e, n, device=device).to(dtype) if has_bias else None
    format.pop("nested", None)
    if config.single:
        out = run(x, tensors, config, ids.int(), bias, **format)
    else:
        out = run(x, tensors, config, stops, bias, **format)
    assert_within_budget(out, by_weight(x.double(), exact, ids, bias), by_weight(x, exact, ids, bias))
    assert not out[len(ids) - behind :].any()


SHAPES = [
    pytest.param(EIGHT_WARPS, 1536, 2048, id="a-slice-a-warp"),
    pytest.param(replace(SIXTEEN_WARPS, abreast=2, flush=1), 96, 2048, id="two-tiles-abreast"),
    pytest.param(replace(SIXTEEN_WARPS, abreast=4, covers=2, flush=1), 64, 2048, id="two-slices-four-abreast"),
    pytest.param(replace(SIXTEEN_WARPS, abreast=4, quarters=3, flush=1), 192, 768, id="slices-of-192"),
    pytest.param(replace(EIGHT_WARPS, abreast=8, quarters=3, covers=4, registers=255), 128, 768, id="all-of-k-a-warp"),
    pytest.param(replace(SIXTEEN_WARPS, quarters=3, flush=2), 48, 2880, id="an-idle-warp"),
    pytest.param(replace(EIGHT_WARPS, quarters=3, stages=3), 48, 1408, id="partial-slice-of-192"),
    pytest.param(EIGHT_WARPS, 48, 1440, id="partial-slice"),
    pytest.param(replace(SIXTEEN_WARPS, covers=2, split=2, flush=4), 32, 14336, id="two-splits"),
    pytest.param(replace(SIXTEEN_WARPS, quarters=3, split=3), 16, 7200, id="splits-of-partial-slices"),
    pytest.param(replace(SIXTEEN_WARPS, programs=1), 16, 256, id="one-program-and-one-slice"),
    pytest.param(replace(SIXTEEN_WARPS, programs=5), 16, 4096, id="one-tile-a-weight"),
]


@pytest.mark.parametrize("single", [False, True], ids=["groups", "rows"])
@pytest.mark.parametrize("block_m", [8, 16])
@pytest.mark.parametrize("config, n, k", SHAPES)
def test_each_row_meets_its_weight(config, n, k, block_m, single, device):
    if block_m * config.covers * config.quarters > 96:
        block_m = 8  # registers hold no more
    check(replace(config, block_m=block_m, single=single), GROUPS, n, k, device)


@pytest.mark.parametrize("quarters", [3, 4])
@pytest.mark.parametrize("nested", [False, True], ids=["absmax", "nested"])
@pytest.mark.parametrize("block_size", [64, 128, 256])
@pytest.mark.parametrize("quant_type, dtype", [("fp4", torch.float16), ("nf4", torch.bfloat16)])
def test_formats(quant_type, dtype, block_size, nested, quarters, device):
    config = replace(SIXTEEN_WARPS, quarters=quarters)
    format = {"quant_type": quant_type, "block_size": block_size, "nested": nested}
    check(config, GROUPS, 80, 2304, device, dtype, has_bias=nested, **format)


@pytest.mark.parametrize(
    "groups",
    [
        pytest.param([0, 0, 0], id="no-rows"),
        pytest.param([700], id="one-weight"),
        pytest.param([0, 700, 0], id="rows-of-one-weight"),
        pytest.param([77] * 9, id="as-many-each"),
        pytest.param([1] * 131, id="a-row-each"),
    ],
)
def test_groups(groups, device):
    for block_m in (8, 16):
        for programs in (1, 7, 132):
            check(replace(SIXTEEN_WARPS, block_m=block_m, programs=programs), groups, 208, 512, device)


def test_rows_of_one_row_of_x_have_weights_in_any_order(device):
    tensors, exact = stack(5, 112, 2880, device)
    x, bias = torch.randn(6, 2880, device=device).bfloat16(), torch.randn(5, 112, device=device)
    each = x.repeat_interleave(4, dim=0)
    for dtype in (torch.int32, torch.int64):
        ids = torch.randint(-1, 6, (24,), device=device).to(dtype)
        for split in (1, 2):
            config = replace(SIXTEEN_WARPS, quarters=3, split=split, single=True)
            expected = by_weight(each.double(), exact, ids, bias), by_weight(each, exact, ids, bias)
            assert_within_budget(run(x, tensors, config, ids, bias), *expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["absmax", "nested"])
@pytest.mark.parametrize("split", [1, 2])
def test_a_row_of_no_weight_is_zero_whatever_the_weights_are(split, nested, value, device):
    weight, absmax, *scales = stack(3, 112, 2880, device, nested=nested)[0]
    (scales[0] if nested else absmax)[:] = value
    x, bias = torch.randn(3, 2880, device=device).bfloat16(), torch.ones(3, 112, device=device)
    config = replace(SIXTEEN_WARPS, quarters=3, split=split, single=True)
    ids = torch.tensor([3, 1, -1], device=device)
    out = run(x, (weight, absmax, *scales), config, ids, bias)
    assert not out[[0, 2]].any()
    assert not out[1].isfinite().any()


def test_a_product_repeats_bit_for_bit(device):
    tensors, _ = stack(len(GROUPS), 1536, 2048, device)
    stops = torch.tensor(list(accumulate(GROUPS)), dtype=torch.int32, device=device)
    x = torch.randn(sum(GROUPS), 2048, device=device).bfloat16()
    for config in (EIGHT_WARPS, replace(EIGHT_WARPS, split=2), replace(SIXTEEN_WARPS, abreast=2, block_m=16)):
        first = run(x, tensors, config, stops)
        assert all(torch.equal(run(x, tensors, config, stops), first) for _ in range(20))


def test_a_stack_of_one_weight_is_that_weight(device):
    tensors, _ = stack(1, 1008, 4096, device)
    x, stops = torch.randn(8, 4096, device=device).bfloat16(), torch.tensor([8], dtype=torch.int32, device=device)
    weight, absmax, *scales = tensors
    out = torch.empty(8, 1008, dtype=x.dtype, device=device)
    in_stack = run(x, tensors, SIXTEEN_WARPS, stops)
    from bigq_kernels.block4.gluon.sliced import linear_4bit_sliced  # not on all releases of Triton

    linear_4bit_sliced(x, packed4((weight[0], absmax[0], *scales), "nf4", 64), None, out, SIXTEEN_WARPS)
    assert torch.equal(in_stack, out)


@pytest.mark.slow
@pytest.mark.parametrize("single", [False, True], ids=["groups", "rows"])
def test_more_than_2_to_the_31_weights(single, device):
    e, n, k = 5, 2**17, 8192  # 2.7 GB of codes
    x, bias = torch.randn(3, k, device=device).bfloat16(), torch.randn(e, n, device=device).bfloat16()
    weight = torch.randint(0, 256, (e, n, k // 2), dtype=torch.uint8, device=device)
    absmax = torch.rand(e, n, k // 64, device=device)
    ids = torch.tensor([0, 4, 4], dtype=torch.int32, device=device)
    stops = torch.tensor([1, 1, 1, 1, 3], dtype=torch.int32, device=device)
    for split in (1, 2):
        config = replace(SIXTEEN_WARPS, covers=2 // split, split=split, single=single)
        out = run(x, (weight, absmax, None, None), config, ids if single else stops, bias)
        for row, of in enumerate(ids.tolist()):
            expected = reference.linear_4bit(
                x[row : row + 1], weight[of, -64:], absmax[of, -64:], bias[of, -64:], None, None, "nf4", 64
            )
            torch.testing.assert_close(out[row : row + 1, -64:], expected, rtol=2e-2, atol=0.5)
