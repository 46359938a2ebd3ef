"""LLM.int8() against float64 products: at most twice the error torch makes in the same dtype."""

from dataclasses import replace

import pytest
import torch

from bigq.ops import reference
from bigq.testing import assert_within_budget
from bigq_kernels.int8.choose import choose
from bigq_kernels.int8.linear import linear_int8
from linear_cases import DTYPES, int8_case


def exact_linear_int8(x, weight, absmax, threshold):
    """LLM.int8() with the codes of the specification and float64 sums."""
    outlier = x.abs() >= threshold if threshold > 0 else torch.zeros_like(x, dtype=torch.bool)
    column = outlier.any(dim=0)
    regular = x.float().masked_fill(outlier, 0.0)
    scale = regular.abs().amax(dim=1, keepdim=True)
    codes = (regular * (127.0 / scale.clamp_min(2.0**-119))).round().masked_fill(column, 0)
    total = codes.double() @ weight.double().T * scale.double() * absmax.double().T / 127**2
    dense = reference.dequantize_int8(weight[:, column], absmax, x.dtype)
    return total + x[:, column].double() @ dense.double().T


INT8_SHAPES = [
    pytest.param(1, 40, 256, id="one-token"),
    pytest.param(3, 40, 97, id="odd-columns"),
    pytest.param(20, 70, 300, id="more-tokens-than-one-scan"),
    pytest.param(70, 33, 128, id="large-tile"),
    pytest.param(2, 6, 17000, id="row-longer-than-a-tile"),
    pytest.param(512, 4096, 4096, id="many-tiles", marks=pytest.mark.gpu),
    pytest.param(2049, 4100, 1000, id="many-partial-tiles", marks=pytest.mark.gpu),
]


THRESHOLDS_AND_DTYPES = [  # on the CPU each threshold in one dtype: long rows take the interpreter 9 s
    pytest.param(0.0, torch.float32, id="0-float32"),
    pytest.param(2.5, torch.float16, id="2.5-float16"),
    pytest.param(6.0, torch.float32, id="6-float32"),
    pytest.param(100.0, torch.float16, id="100-float16"),
    *(
        pytest.param(threshold, torch.bfloat16, id=f"{threshold:g}-bfloat16", marks=pytest.mark.gpu)
        for threshold in (0.0, 2.5, 6.0, 100.0)
    ),
]


@pytest.mark.parametrize("threshold, dtype", THRESHOLDS_AND_DTYPES)
@pytest.mark.parametrize("m, n, k", INT8_SHAPES)
def test_linear_int8(m, n, k, threshold, dtype, device):
    x, weight, absmax = int8_case(m, n, k, dtype, device)
    exact = exact_linear_int8(x, weight, absmax, threshold)
    baseline = reference.linear_int8(x, weight, absmax, None, threshold)
    assert_within_budget(linear_int8(x, weight, absmax, None, threshold), exact, baseline)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, n, k", INT8_SHAPES)
def test_linear_int8_without_outliers_is_exact(m, n, k, dtype, device):
    x, weight, absmax = int8_case(m, n, k, dtype, device)
    assert torch.equal(linear_int8(x, weight, absmax, None, 0.0), reference.linear_int8(x, weight, absmax, None, 0.0))


@pytest.mark.parametrize("threshold", [0.0, 2.5])
@pytest.mark.parametrize("m", [1, 20, 70])
def test_linear_int8_of_the_bits_of_absmax(m, threshold, device):
    x, weight, absmax = int8_case(m, 33, 97, torch.float16, device)
    floats = linear_int8(x, weight, absmax, None, threshold)
    assert torch.equal(linear_int8(x, weight, absmax.view(torch.int32), None, threshold), floats)


@pytest.mark.parametrize(
    "m, k",
    [
        pytest.param(4, 70, id="few-tokens"),
        pytest.param(20, 300, id="more-than-are-gathered-before"),
        pytest.param(70, 300, id="many-tokens"),
        pytest.param(2, 600, id="two-tokens"),
    ],
)
def test_linear_int8_with_outliers_only(m, k, device):
    x, weight, absmax = int8_case(m, 24, k, torch.float16, device)
    x = x.sign() * (x.abs() + 6)
    exact = exact_linear_int8(x, weight, absmax, 6.0)
    baseline = reference.linear_int8(x, weight, absmax, None, 6.0)
    assert_within_budget(linear_int8(x, weight, absmax, None, 6.0), exact, baseline)


@pytest.mark.parametrize("way", ["tiles", "gather"])
@pytest.mark.parametrize("count", [0, 1, 2, 4, 5, 16, 17, 130], ids="columns={}".format)
def test_linear_int8_with_so_many_outlier_columns(count, way, device):
    """As many as a tile knows without a search, gathers at once, in several blocks, and more than a launch gathers."""
    x, weight, absmax = int8_case(20, 24, 300, torch.float16, device)
    x = x.clamp(-2, 2)
    columns = torch.linspace(0, 299, count, device=device).long() if count != 1 else torch.tensor([199], device=device)
    x[7, columns] = 8.0
    exact = exact_linear_int8(x, weight, absmax, 6.0)
    baseline = reference.linear_int8(x, weight, absmax, None, 6.0)
    choice = replace(choose(x.device, 20, 24, 300, x.dtype, True), way=way)
    assert_within_budget(linear_int8(x, weight, absmax, None, 6.0, choice), exact, baseline)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_linear_int8_bias_and_leading_shape(bias_dtype, device):
    x, weight, absmax = int8_case(6, 24, 64, torch.float16, device)
    bias = torch.randn(24, device=device).to(bias_dtype)
    out = linear_int8(x.view(2, 3, 64), weight, absmax, bias, 6.0).view(6, 24)
    exact = exact_linear_int8(x, weight, absmax, 6.0) + bias.double()
    assert_within_budget(out, exact, reference.linear_int8(x, weight, absmax, bias, 6.0))
    assert linear_int8(x[:0], weight, absmax, bias, 6.0).shape == (0, 24)
    assert linear_int8(x[0], weight, absmax, bias, 6.0).shape == (24,)


@pytest.mark.parametrize("threshold", [0.0, 6.0], ids="threshold={:g}".format)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 70, 0), (0, 0)], ids=str)
def test_linear_int8_without_columns_gives_the_bias(shape, bias_dtype, threshold, device):
    weight, absmax = reference.quantize_int8(torch.randn(24, 0, device=device))
    x = torch.randn(shape, device=device, dtype=torch.float16)
    bias = None if bias_dtype is None else torch.randn(24, device=device).to(bias_dtype)
    expected = torch.zeros(*shape[:-1], 24, device=device, dtype=x.dtype)
    if bias is not None:
        expected += bias.to(x.dtype)
    for linear in (linear_int8, reference.linear_int8):
        out = linear(x, weight, absmax, bias, threshold)
        assert out.dtype == x.dtype
        assert torch.equal(out, expected)


@pytest.mark.parametrize("threshold", [0.0, 6.0], ids="threshold={:g}".format)
def test_linear_int8_of_empty_outputs(threshold, device):
    x, weight, absmax = int8_case(3, 24, 64, torch.float16, device)
    bias = torch.randn(24, device=device)
    for linear in (linear_int8, reference.linear_int8):
        assert linear(x[:0].view(2, 0, 64), weight, absmax, bias, threshold).shape == (2, 0, 24)
        assert linear(x, weight[:0], absmax[:0], bias[:0], threshold).shape == (3, 0)


def test_linear_int8_threshold_is_compared_in_the_dtype_of_x(device):
    x, weight, absmax = int8_case(2, 24, 64, torch.float16, device)
    threshold = 6.1  # 6.1015625 in float16: the element below equals it only after that rounding
    x[0, 3] = 6.1
    exact = exact_linear_int8(x, weight, absmax, threshold)
    baseline = reference.linear_int8(x, weight, absmax, None, threshold)
    assert_within_budget(linear_int8(x, weight, absmax, None, threshold), exact, baseline)


@pytest.mark.parametrize("m", [3, 12, 20, 130], ids="tokens={}".format)
def test_linear_int8_of_a_threshold_that_rounds_to_0(m, device):
    x, weight, absmax = int8_case(m, 24, 97, torch.float16, device)
    exact = x.double() @ reference.dequantize_int8(weight, absmax, x.dtype).double().T  # every column is an outlier
    baseline = reference.linear_int8(x, weight, absmax, None, 1e-9)
    assert_within_budget(linear_int8(x, weight, absmax, None, 1e-9), exact, baseline)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("m", [3, 20, 70], ids=["few-tokens", "more-tokens", "many-tokens"])
def test_linear_int8_keeps_nan_and_inf_in_their_row(m, value, device):
    x, weight, absmax = int8_case(m, 24, 64, torch.float16, device)
    x[1, 7] = value
    finite = linear_int8(x, weight, absmax, None, 6.0).isfinite()
    assert not finite[1].any()
    assert finite[0].all()
    assert finite[2:].all()


@pytest.mark.parametrize("m", [3, 20], ids=["few-tokens", "more-tokens"])
def test_linear_int8_multiplies_all_of_an_outlier_column_in_the_dtype_of_x(m, device):
    x, weight, absmax = int8_case(m, 24, 64, torch.float16, device)
    x[:, :] = 0.0
    x[0, 5], x[1, 5], x[1, 6] = 8.0, 0.3, 5.0  # 0.3 would round to 8/127 * 5.0 in int8
    out = linear_int8(x, weight, absmax, None, 6.0)
    dense = reference.dequantize_int8(weight, absmax, x.dtype).double()
    expected = x.double() @ dense.T
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("m", [1, 4, 5, 8, 16], ids="tokens={}".format)
def test_linear_int8_of_few_tokens_with_outliers_of_very_different_sizes(m, device):
    x, weight, absmax = int8_case(m, 24, 128, torch.float16, device)
    x[0, 9], x[m - 1, 11], x[m // 2, 13] = 2000.0, -40.0, 6.0
    exact = exact_linear_int8(x, weight, absmax, 6.0)
    baseline = reference.linear_int8(x, weight, absmax, None, 6.0)
    assert_within_budget(linear_int8(x, weight, absmax, None, 6.0), exact, baseline)


@pytest.mark.parametrize("threshold", [0.0, 2.5], ids="threshold={}".format)
@pytest.mark.parametrize("m", [2, 20, 130], ids="tokens={}".format)
def test_linear_int8_split_along_k_gives_the_same_bits(m, threshold, device):
    x, weight, absmax = int8_case(m, 40, 400, torch.bfloat16, device)
    choice = choose(x.device, m, 40, 400, x.dtype, threshold > 0)
    steps = -(-400 // choice.config.block_k)
    configs = [
        replace(choice.config, split=-(-steps // per_split), steps_per_split=per_split) for per_split in (steps, 2, 1)
    ]
    outputs = [linear_int8(x, weight, absmax, None, threshold, replace(choice, config=config)) for config in configs]
    assert torch.equal(outputs[1], outputs[0])
    assert torch.equal(outputs[2], outputs[0])


@pytest.mark.parametrize("m", [20, 130], ids="tokens={}".format)
def test_linear_int8_gathers_the_same_outliers_before_the_product_and_in_it(m, device):
    x, weight, absmax = int8_case(m, 24, 160, torch.bfloat16, device)  # more outlier columns than are gathered before
    choice = choose(x.device, m, 24, 160, x.dtype, True)
    outputs = [linear_int8(x, weight, absmax, None, 2.0, replace(choice, way=way)) for way in ("gather", "tiles")]
    assert torch.equal(*outputs)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 40, 512])
def test_linear_int8_repeats_bit_for_bit(m, device):
    x, weight, absmax = int8_case(m, 4096, 4096, torch.bfloat16, device)
    first = linear_int8(x, weight, absmax, None, 3.0)
    assert all(torch.equal(linear_int8(x, weight, absmax, None, 3.0), first) for _ in range(200))


@pytest.mark.parametrize("stride", [0, 2], ids=["expanded", "strided"])
def test_linear_int8_of_strided_bias(stride, device):
    x, weight, absmax = int8_case(3, 24, 97, torch.float16, device)
    bias = torch.randn(2 * 24, device=device).as_strided((24,), (stride,))
    out = linear_int8(x, weight, absmax, bias, 6.0)
    assert torch.equal(out, linear_int8(x, weight, absmax, bias.contiguous(), 6.0))
