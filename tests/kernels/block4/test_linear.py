"""4-bit linears against float64 products of the dequantized weight: at most twice the error torch makes in that dtype.

The last tests are of all linears.
"""

from itertools import combinations, product

import pytest
import torch

from bigq.ops import reference
from bigq.testing import assert_within_budget
from bigq_kernels.block4.configs import MAX_MMA_M
from bigq_kernels.block4.linear import linear_4bit
from bigq_kernels.int8.linear import linear_int8
from linear_cases import check_linear_4bit, int8_case, quantized_4bit


@pytest.mark.parametrize(
    "quant_type, nested, dtype",
    [  # every pair of two of them
        pytest.param("nf4", False, torch.float16, id="nf4-float16"),
        pytest.param("nf4", True, torch.float32, id="nf4-nested-float32"),
        pytest.param("fp4", False, torch.float32, id="fp4-float32"),
        pytest.param("fp4", True, torch.float16, id="fp4-nested-float16"),
        pytest.param("nf4", True, torch.bfloat16, id="nf4-nested-bfloat16", marks=pytest.mark.gpu),
        pytest.param("fp4", False, torch.bfloat16, id="fp4-bfloat16", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize(
    "m, n, k, block_size",
    [
        pytest.param(1, 48, 1024, 64, id="whole-steps"),
        pytest.param(3, 33, 96, 64, id="partial-block-and-rows"),
        pytest.param(9, 40, 160, 32, id="block-32"),
        pytest.param(20, 40, 512, 256, id="block-256"),
        pytest.param(2, 20, 64, 4096, id="block-longer-than-a-row"),
        pytest.param(40, 70, 320, 64, id="32-to-64-tokens"),
        pytest.param(MAX_MMA_M + 1, 30, 64, 64, id="not-fused-many-tokens"),
        pytest.param(3, 5, 77, 64, id="not-fused-odd-columns"),
    ],
)
def test_linear_4bit(m, n, k, block_size, quant_type, nested, dtype, device):
    check_linear_4bit(torch.randn(m, k, device=device).to(dtype), n, quant_type, block_size, nested)


@pytest.mark.parametrize("nested", [False, True], ids=["absmax", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(
    "m, n, k, block_size",
    [
        pytest.param(1, 20, 128, 64, id="dp4a"),
        pytest.param(9, 20, 96, 32, id="mma"),
        pytest.param(3, 5, 77, 64, id="not-fused"),
        pytest.param(16, 1024, 4096, 64, id="gluon", marks=pytest.mark.gpu),
        pytest.param(128, 14336, 4096, 64, id="bulk", marks=pytest.mark.gpu),
        pytest.param(512, 1024, 4096, 64, id="cublas", marks=pytest.mark.gpu),
    ],
)
def test_linear_4bit_of_the_bits_of_scales(m, n, k, block_size, quant_type, nested, device):
    (weight, absmax, *pair), _ = quantized_4bit(n, k, quant_type, block_size, nested, device)
    x, bias = torch.randn(m, k, device=device).half(), torch.randn(n, device=device)
    floats = linear_4bit(x, weight, absmax, bias, *pair, quant_type, block_size, k)
    if nested:
        pair = [scales.view(torch.int32) for scales in pair]
    else:
        absmax = absmax.view(torch.int32)
    assert torch.equal(linear_4bit(x, weight, absmax, bias, *pair, quant_type, block_size, k), floats)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [2, MAX_MMA_M + 1], ids=["fused", "not-fused"])
def test_linear_4bit_bias(m, bias_dtype, device):
    bias = torch.randn(40, device=device).to(bias_dtype)
    check_linear_4bit(torch.randn(m, 128, device=device).half(), 40, "nf4", 64, bias=bias)


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (1, 1, 1, 64), (0, 64), (2, 0, 64)], ids=str)
def test_linear_4bit_leading_shape(shape, device):
    (weight, absmax, _, _), dense = quantized_4bit(24, 64, "nf4", 64, False, device)
    x = torch.randn(shape, device=device).half()
    out = linear_4bit(x, weight, absmax, None, None, None, "nf4", 64)
    assert out.shape == (*shape[:-1], 24)
    if x.numel():
        assert_within_budget(out, x.double() @ dense.T, (x.double() @ dense.T).half())


def test_linear_4bit_of_views(device):
    (weight, absmax, _, _), dense = quantized_4bit(24, 64, "nf4", 64, False, device)
    base = torch.randn(8 * 64 + 1, device=device).half()
    for x in (base[1:].view(8, 64), base[:-1].view(64, 8).T, base[:-1].view(4, 128)[:, ::2]):
        expected = reference.linear_4bit(x, weight, absmax, None, None, None, "nf4", 64)
        out = linear_4bit(x, weight, absmax, None, None, None, "nf4", 64)
        assert_within_budget(out, x.double() @ dense.T, expected)


@pytest.mark.parametrize("stride", [0, 2], ids=["expanded", "strided"])
@pytest.mark.parametrize("m", [1, 9, MAX_MMA_M + 1], ids=["dp4a", "mma", "not-fused"])
def test_linear_4bit_of_strided_bias_and_scales(m, stride, device):
    (weight, codes, nested, offset), _ = quantized_4bit(24, 512, "nf4", 32, True, device)
    x, memory = torch.randn(m, 512, device=device).half(), torch.randn(2 * 24, device=device)
    bias = memory.as_strided((24,), (stride,))
    strided = torch.stack([nested, torch.zeros_like(nested)], dim=1)[:, 0]
    out = linear_4bit(x, weight, codes, bias, strided, offset, "nf4", 32)
    assert not strided.is_contiguous()
    assert torch.equal(out, linear_4bit(x, weight, codes, bias.contiguous(), nested, offset, "nf4", 32))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [2, 5, MAX_MMA_M + 1], ids=["dp4a", "mma", "not-fused"])
def test_linear_4bit_keeps_nan_and_inf_in_their_row(m, value, device):
    weight, absmax = reference.quantize_4bit(torch.randn(24, 64, device=device), "nf4", 64)
    x = torch.randn(m, 64, device=device).half()
    x[1, 7] = value
    finite = linear_4bit(x, weight, absmax, None, None, None, "nf4", 64).isfinite().all(dim=1)
    assert not finite[1]
    assert finite[0]
    assert finite[2:].all()


MODEL_SHAPES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (4100, 11008)]
MODEL_TOKENS = [1, 2, 4, 8, 9, 16, 32, 33, 64, 65, 128, 512]
MODEL_CASES = [  # every pair of shape and tokens; the other factors take turns, so that all pairs of factors meet
    (shape, m, ("nf4", "fp4")[(i + j) % 2], (i // 2 + j) % 2 == 1, (torch.float16, torch.bfloat16)[(i + j // 2) % 2])
    for (i, shape), (j, m) in product(enumerate(MODEL_SHAPES), enumerate(MODEL_TOKENS))
]


def test_model_cases_hold_every_pair_of_two_factors():
    for one, two in combinations(zip(*MODEL_CASES, strict=True), 2):
        assert set(zip(one, two, strict=True)) == set(product(set(one), set(two)))


@pytest.mark.gpu
@pytest.mark.parametrize("shape, m, quant_type, nested, dtype", MODEL_CASES, ids=str)
def test_linear_4bit_at_model_shapes(shape, m, quant_type, nested, dtype, device):
    n, k = shape
    check_linear_4bit(torch.randn(m, k, device=device).to(dtype), n, quant_type, 64, nested)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 2, 8, 16, 32, 64, 128])
def test_linear_4bit_repeats_bit_for_bit(m, device):
    (weight, absmax, nested_absmax, nested_offset), _ = quantized_4bit(4096, 4096, "nf4", 64, True, device)
    x = torch.randn(m, 4096, device=device).bfloat16()
    args = (x, weight, absmax, None, nested_absmax, nested_offset, "nf4", 64)
    first = linear_4bit(*args)
    assert all(torch.equal(linear_4bit(*args), first) for _ in range(200))


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["linear_4bit", "linear_4bit-nested", "linear_int8"])
@pytest.mark.parametrize("m", [1, 40, 512])
def test_cuda_graph_follows_its_input(m, op, device):
    if op == "linear_int8":
        x, weight, absmax = int8_case(m, 1024, 4096, torch.bfloat16, device)

        def forward():
            return linear_int8(x, weight, absmax, None, 6.0)
    else:
        nested = op.endswith("nested")
        (weight, absmax, nested_absmax, nested_offset), _ = quantized_4bit(1024, 4096, "nf4", 64, nested, device)
        x = torch.randn(m, 4096, device=device).bfloat16()

        def forward():
            return linear_4bit(x, weight, absmax, None, nested_absmax, nested_offset, "nf4", 64)

    forward()  # compile, and make the constant tables
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    for outliers in (0, 3, 50):  # how many is known to the device only
        x.copy_(torch.randn(x.shape, device=device))
        x[:, :outliers] = 8.0
        graph.replay()
        assert torch.equal(out, forward())


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 3])
def test_linears_of_more_than_2_to_the_31_weights(m, device):
    n, k, tail = 2**19 + 3, 4096, 64
    x = torch.randn(m, k, device=device).bfloat16()
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    absmax = torch.rand(n, k // 64, device=device)
    out = linear_4bit(x, packed, absmax, None, None, None, "nf4", 64)[:, -tail:]
    assert torch.equal(out, linear_4bit(x, packed[-tail:], absmax[-tail:], None, None, None, "nf4", 64))
    weight = packed.view(torch.int8).repeat(1, 2)
    scale = torch.rand(n, 1, device=device)
    out = linear_int8(x, weight, scale, None, 2.0)[:, -tail:]
    assert torch.equal(out, linear_int8(x, weight[-tail:], scale[-tail:], None, 2.0))
