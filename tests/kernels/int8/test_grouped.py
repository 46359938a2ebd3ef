"""Products of rows with a stack of int8 weights, each row by its own, against LLM.int8() row by row in float64."""

import pytest
import torch

from bigq.ops import reference
from bigq_kernels.int8.choose_grouped import choose_grouped
from bigq_kernels.int8.grouped import grouped_linear_int8, routed_linear_int8
from bigq_kernels.int8.linear import linear_int8
from bigq_kernels.int8.product import multiply_int8
from linear_cases import DTYPES, assert_within_budget

STOPS = {  # by what is special of them
    "all weights": [2, 5, 6, 9],
    "weights without rows": [0, 4, 4, 9],
    "rows behind the last": [1, 3, 3, 7],
    "no rows": [0, 0, 0, 0],
}
S, E, N, K = 9, 4, 24, 160


def stack(device, e=E, n=N, k=K):
    weight, absmax = reference.quantize_int8(torch.randn(e * n, k, device=device))
    return weight.view(e, n, k), absmax.view(e, n, 1)


def rows_with_outliers(rows, k, dtype, device):
    """Outliers in the first, the last and other rows, in three columns."""
    x = torch.randn(rows, k, device=device).clamp(-5, 5)
    x[0, 5], x[-1, k - 1], x[rows // 2, k // 2] = 9.0, -6.0, 20.0
    return x.to(dtype)


def exact_rows(x, ids, weight, absmax, bias, threshold):
    """Row i of [S, N]: x[i] times the weight ids[i]; outlier columns are those of all rows of x."""
    outlier = x.abs() >= threshold if threshold > 0 else torch.zeros_like(x, dtype=torch.bool)
    column = outlier.any(dim=0)
    regular = x.float().masked_fill(outlier, 0.0)
    scale = regular.abs().amax(dim=1, keepdim=True)
    codes = (regular * (127.0 / scale.clamp_min(2.0**-119))).round().masked_fill(column, 0)
    dense = reference.dequantize_int8(weight.flatten(0, 1), absmax.flatten(0, 1), x.dtype).view_as(weight).double()
    known = ids.clamp(0, len(weight) - 1)
    total = torch.einsum("sk,snk->sn", codes.double(), weight[known].double())
    out = total * scale.double() * absmax[known][..., 0].double() / 127**2
    out += torch.einsum("sk,snk->sn", x[:, column].double(), dense[known][..., column])
    out += 0 if bias is None else bias[known].double()
    return out * (ids == known)[:, None]


def ids_of(stops, device):
    ends = torch.tensor(stops, device=device)
    return torch.searchsorted(ends, torch.arange(S, device=device), right=True)


@pytest.mark.parametrize("threshold", [0.0, 2.5, 6.0], ids="threshold={:g}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STOPS)
def test_each_weight_multiplies_its_rows(name, dtype, threshold, device):
    (weight, absmax), x = stack(device), rows_with_outliers(S, K, dtype, device)
    bias = torch.randn(E, N, device=device).to(dtype)
    stops = torch.tensor(STOPS[name], dtype=torch.int32, device=device)
    args = (x, stops, weight, absmax, bias, threshold)
    exact = exact_rows(x, ids_of(STOPS[name], device), weight, absmax, bias, threshold)
    expected = reference.grouped_linear_int8(*args)
    got = grouped_linear_int8(*args)
    assert_within_budget(got, exact, expected)
    assert_within_budget(expected, exact, expected)
    assert not got[STOPS[name][-1] :].any()


@pytest.mark.parametrize("threshold", [0.0, 6.0], ids="threshold={:g}".format)
@pytest.mark.parametrize("repeat", [1, 3])
def test_rows_in_any_order_have_their_own_weight(repeat, threshold, device):
    for e, dtype in ((24, torch.float16), (24, torch.float32), (2, torch.float16)):
        # Of 24 weights four rows are few, and single; of two they are sorted.
        rows = 6 if e == 24 else S
        (weight, absmax), x = stack(device, e=e, n=8), rows_with_outliers(rows // repeat, K, dtype, device)
        bias, ids = torch.randn(e, 8, device=device).to(dtype), torch.randint(0, e, (rows,), device=device)
        ids[1], ids[4] = e, -1  # no weight has these
        args = (x, ids, weight, absmax, bias, threshold)
        each = x.repeat_interleave(repeat, dim=0)
        exact, expected = exact_rows(each, ids, weight, absmax, bias, threshold), reference.routed_linear_int8(*args)
        for got in (routed_linear_int8(*args), routed_linear_int8(x, ids.int(), *args[2:])):
            assert_within_budget(got, exact, expected)
            assert not got[[1, 4]].any()


@pytest.mark.parametrize("m, dtype", [(2, torch.float16), (20, torch.float16), (2, torch.float32)], ids=str)
def test_a_stack_of_one_weight_is_that_weight(m, dtype, device):
    (weight, absmax), x = stack(device, e=1), rows_with_outliers(m, K, dtype, device)
    stops = torch.tensor([m], dtype=torch.int32, device=device)
    exact = exact_rows(x, torch.zeros(m, dtype=torch.int64, device=device), weight, absmax, None, 6.0)
    got = grouped_linear_int8(x, stops, weight, absmax, None, 6.0)
    assert_within_budget(got, exact, linear_int8(x, weight[0], absmax[0], None, 6.0))


def test_outlier_columns_are_gathered_before_the_product_or_in_it(device):
    (weight, absmax), x = stack(device), rows_with_outliers(S, K, torch.float16, device)
    stops = torch.tensor(STOPS["rows behind the last"], dtype=torch.int32, device=device)
    config = choose_grouped(device, S, E, N, K, x.dtype, True).config
    outputs = [torch.full((S, N), float("nan"), dtype=x.dtype, device=device) for _ in range(2)]
    for out, way in zip(outputs, ("gather", "tiles"), strict=True):
        multiply_int8(x, weight, absmax, None, out, 2.0, way, config, stops=stops)
    assert torch.equal(*outputs)


def test_all_rows_of_an_outlier_column_are_multiplied_in_the_dtype_of_x(device):
    (weight, absmax), x = stack(device, n=8), torch.zeros(S, K, dtype=torch.float16, device=device)
    x[0, 5], x[1:, 5], x[1:, 6] = 8.0, 0.3, 5.0  # 0.3 would round to 8/127 * 5.0 in int8
    stops = torch.tensor([1, 4, 6, 9], dtype=torch.int32, device=device)
    dense = reference.dequantize_int8(weight.flatten(0, 1), absmax.flatten(0, 1), x.dtype).view_as(weight)
    expected = torch.einsum("sk,snk->sn", x.double(), dense[ids_of([1, 4, 6, 9], device)].double())
    got = grouped_linear_int8(x, stops, weight, absmax, None, 6.0)
    torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("e", [4, 40], ids=["sorted", "single"])
def test_nan_and_inf_stay_in_their_row(e, value, device):
    (weight, absmax), x = stack(device, e=e, n=8), torch.randn(S, K, device=device).half()
    x[1, 7] = value
    ids = torch.randint(0, e, (S,), device=device)
    finite = routed_linear_int8(x, ids, weight, absmax, None, 6.0).isfinite()
    assert not finite[1].any()
    assert finite[[0, *range(2, S)]].all()


def test_a_row_of_no_weight_is_zero_whatever_the_weights_are(device):
    (weight, absmax), x = stack(device, e=24, n=8), torch.randn(2, K, device=device).half()
    absmax[:] = float("inf")
    ids = torch.tensor([24, -1], device=device)
    assert not routed_linear_int8(x, ids, weight, absmax, torch.ones(24, 8, device=device), 6.0).any()


def test_stops_ids_and_weights_may_have_gaps_between_them(device):
    (weight, absmax), x = stack(device, e=24, n=8), rows_with_outliers(6, K, torch.float16, device)
    bias = torch.randn(24, 16, device=device)[:, ::2]
    apart = weight.repeat_interleave(2, dim=1)[:, ::2], absmax.repeat_interleave(2, dim=1)[:, ::2], bias, 6.0
    whole = weight, absmax, bias.contiguous(), 6.0
    stops = torch.arange(24, dtype=torch.int32, device=device).clamp_max(6)
    ids = torch.randint(0, 24, (6,), device=device)
    for linear, route in ((grouped_linear_int8, stops), (routed_linear_int8, ids)):
        route_apart = torch.stack([route, route + 1], dim=1)[:, 0]
        assert torch.equal(linear(x, route_apart, *apart), linear(x, route, *whole))


@pytest.mark.parametrize("threshold", [0.0, 6.0], ids="threshold={:g}".format)
def test_what_is_empty_gives_zeros_or_biases(threshold, device):
    for rows, e, n, k in ((0, 4, 8, 16), (3, 4, 0, 16), (3, 0, 8, 16), (3, 4, 8, 0)):
        (weight, absmax), x = stack(device, e, n, k), torch.randn(rows, k, device=device).half()
        bias = torch.randn(e, n, device=device).half()
        stops = torch.tensor([0, 1, 1, 2][:e], dtype=torch.int32, device=device)
        ids = torch.tensor([1, 3, 4][:rows], dtype=torch.int64, device=device)
        for given in (bias, None):
            args = (weight, absmax, given, threshold)
            assert torch.equal(grouped_linear_int8(x, stops, *args), reference.grouped_linear_int8(x, stops, *args))
            assert torch.equal(routed_linear_int8(x, ids, *args), reference.routed_linear_int8(x, ids, *args))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 40, 700, 3000])
def test_many_rows_and_wide_weights(rows, dtype):
    e, n, k = 9, 200, 768
    (weight, absmax), x = stack("cuda", e, n, k), rows_with_outliers(rows, k, dtype, "cuda")
    bias, ids = torch.randn(e, n, device="cuda").to(dtype), torch.randint(-1, e + 1, (rows,), device="cuda")
    # Below 3, every column is an outlier: in float32 the sum of rests and codes has another order than the reference's.
    for threshold in (0.0, 6.0) if dtype == torch.float32 else (0.0, 3.0, 6.0):
        args = (x, ids, weight, absmax, bias, threshold)
        got = routed_linear_int8(*args)
        exact = exact_rows(x, ids, weight, absmax, bias, threshold)
        assert_within_budget(got, exact, reference.routed_linear_int8(*args))
        assert all(torch.equal(routed_linear_int8(*args), got) for _ in range(20))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 300])
def test_a_graph_captures_it(rows):
    (weight, absmax), x = stack("cuda", 16, 96, 256), rows_with_outliers(rows, 256, torch.bfloat16, "cuda")
    ids = torch.randint(0, 16, (rows,), device="cuda")
    expected = routed_linear_int8(x, ids, weight, absmax, None, 6.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = routed_linear_int8(x, ids, weight, absmax, None, 6.0)
    graph.replay()
    assert torch.equal(out, expected)
    other = ids.flip(0).contiguous()
    expected = routed_linear_int8(x, other, weight, absmax, None, 6.0)
    ids.copy_(other)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_nothing_of_a_product_without_rows_is_written_after_it():
    # 128 long tokens are quantized for tens of microseconds, in programs that all start at once. A product whose
    # programs ended without waiting for that would let the next kernel write into memory that is still written to.
    (weight, absmax), m, k = stack("cuda", 4, 64, 1 << 17), 128, 1 << 17
    x, stops = torch.randn(m, k, device="cuda").half(), torch.zeros(4, dtype=torch.int32, device="cuda")
    grouped_linear_int8(x, stops, weight, absmax, None, 0.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = grouped_linear_int8(x, stops, weight, absmax, None, 0.0)
        after = torch.full((m, k), 77, dtype=torch.int8, device="cuda")  # in the memory of the codes
    for _ in range(20):
        graph.replay()
        assert (after == 77).all()
    assert not out.any()
