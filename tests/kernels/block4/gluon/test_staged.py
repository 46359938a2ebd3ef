"""The kernel of 3 to 32 tokens in Gluon: tiles, blocks, dtypes and splits of K, against float64 products."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from bigq.ops import reference
from bigq.testing import assert_within_budget
from bigq_kernels.block4.choose import choose
from bigq_kernels.block4.configs import staged_config
from bigq_kernels.block4.linear import linear_4bit
from bigq_kernels.gpu import Gpu
from linear_cases import packed4, quantized_4bit

pytestmark = pytest.mark.gpu


def check(x, n, quant_type, block_size, nested, bias=None):
    """As check_linear_4bit, by this kernel, which is not the fastest for all of these."""
    if not Gpu.of(x.device).gluon:
        pytest.skip("another release of Triton, or another GPU")
    from bigq_kernels.block4.gluon.staged import linear_4bit_staged  # not on all releases of Triton

    m, k = x.shape
    quantized, dense = quantized_4bit(n, k, quant_type, block_size, nested, x.device)
    exact = x.double() @ dense.T
    if bias is not None:
        exact = exact + bias.double()
    out = torch.full((m, n), torch.nan, device=x.device, dtype=x.dtype)
    packed = packed4(quantized, quant_type, block_size)
    linear_4bit_staged(x, packed, bias, out, staged_config(Gpu.of(x.device), m, n, k))
    weight, absmax, *nested_tensors = quantized
    expected = reference.linear_4bit(x, weight, absmax, bias, *nested_tensors, quant_type, block_size)
    assert_within_budget(out, exact, expected)


@pytest.mark.parametrize("m", [3, 4, 5, 8, 9, 16, 17, 31, 32])
@pytest.mark.parametrize(
    "n, k",
    [
        pytest.param(1024, 4096, id="whole-tiles"),
        pytest.param(1003, 4128, id="partial-tile-step-and-block"),
        pytest.param(5, 32, id="less-than-a-tile-and-a-block"),
    ],
)
def test_tiles(n, k, m, device):
    bias = torch.randn(n, device=device)
    for quant_type, (nested, dtype) in product(
        ("nf4", "fp4"), ((False, torch.float16), (True, torch.bfloat16), (m % 2 == 0, torch.bfloat16))
    ):
        check(torch.randn(m, k, device=device).to(dtype), n, quant_type, 64, nested, bias)


@pytest.mark.parametrize("nested", [False, True], ids=["absmax", "nested"])
@pytest.mark.parametrize("block_size", [64, 128, 4096])
@pytest.mark.parametrize("m", [3, 16, 32])
def test_block_sizes(m, block_size, nested, device):
    check(torch.randn(m, 4224, device=device).bfloat16(), 200, "nf4", block_size, nested)


@pytest.mark.parametrize("m", [3, 16, 32])
@pytest.mark.parametrize(
    "programs, next_programs",
    [
        pytest.param(1, 2, id="all-tiles-in-one"),
        pytest.param(2, 8, id="several-tiles-each"),
        pytest.param(5, 136, id="tiles-of-one-or-two"),
        pytest.param(8, 1, id="a-tile-each"),
        pytest.param(11, 3, id="tiles-of-two-or-three"),
        pytest.param(136, 5, id="a-step-each"),
    ],
)
def test_every_number_of_programs_repeats_bit_for_bit(m, programs, next_programs, device):
    if not Gpu.of(device).gluon:
        pytest.skip("another release of Triton, or another GPU")
    from bigq_kernels.block4.gluon.staged import linear_4bit_staged  # not on all releases of Triton

    quantized, dense = quantized_4bit(1003, 4128, "nf4", 64, False, device)  # 8 tiles of 128 rows, 17 steps of 256
    x = torch.randn(m, 4128, device=device).bfloat16()
    out = torch.empty(m, 1003, device=device, dtype=x.dtype)
    shipped = staged_config(Gpu.of(device), m, 1003, 4128)

    def run(programs):
        out.fill_(torch.nan)
        linear_4bit_staged(x, packed4(quantized), None, out, replace(shipped, block_n=128, programs=programs))
        return out.clone()

    first = run(programs)
    baseline = reference.linear_4bit(x, *quantized[:2], None, None, None, "nf4", 64)
    assert_within_budget(first, x.double() @ dense.T, baseline)
    run(next_programs)  # its counters and partial sums are where the allocator puts the next call's
    assert all(torch.equal(run(programs), first) for _ in range(50))


@pytest.mark.slow
@pytest.mark.parametrize("m, way", [(3, "staged"), (16, "staged"), (32, "bulk"), (256, "bulk")])
def test_more_than_2_to_the_31_weights(m, way, device):
    n, k, tail = 2**19 + 67, 8192, 64  # 2**31 bytes of codes as well
    x = torch.randn(m, k, device=device).bfloat16()
    if choose(device, m, n, k, 64, x.dtype).way != way:
        pytest.skip("another release of Triton, or another GPU")
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    absmax = torch.rand(n, k // 64, device=device)
    out = linear_4bit(x, packed, absmax, None, None, None, "nf4", 64)[:, -tail:]
    expected = reference.linear_4bit(x, packed[-tail:], absmax[-tail:], None, None, None, "nf4", 64)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=0.5)
