"""The gradient of x in a product with a stack of 4-bit weights, against that of the dequantized weights row by row."""

import pytest
import torch

from bigq.ops import reference
from bigq_kernels.block4.choose_grouped import choose_gradient
from bigq_kernels.block4.grouped_gradient import grouped_linear_4bit_backward
from bigq_kernels.block4.rows_times_weight import multiply_by_rows
from bigq_kernels.choice import GradientConfig
from bigq_kernels.gpu import Gpu
from linear_cases import assert_within_budget, packed4, quantized_4bit

STOPS = {  # by what is special of them
    "all weights": [2, 5, 6, 9],
    "weights without rows": [0, 4, 4, 9],
    "one weight": [0, 0, 9, 9],
    "rows behind the last": [1, 3, 3, 7],
    "no rows": [0, 0, 0, 0],
}
S, E = 9, 4
CASES = {  # quant_type, block_size, double quantization, N, K
    "whole-steps": ("nf4", 64, False, 64, 128),
    "partial-step": ("nf4", 64, True, 21, 160),
    "small-blocks": ("fp4", 32, True, 24, 96),
    "large-blocks": ("fp4", 256, False, 40, 352),
}


def stack(quant_type, block_size, nested, n, k, device, e=E):
    (weight, absmax, *scales), exact = quantized_4bit(e * n, k, quant_type, block_size, nested, device)
    return (weight.view(e, n, -1), absmax.view(e, n, -1), *scales), exact.view(e, n, k)


def check(got, grad, stops, exact):
    """That `got` is grad times the weights `exact`, within the budget of the weights in the dtype of grad."""
    wide, baseline, start = got.new_zeros(got.shape, dtype=torch.float64), torch.zeros_like(got), 0
    for e, stop in enumerate(stops):
        wide[start:stop] = grad[start:stop].double() @ exact[e]
        baseline[start:stop] = grad[start:stop] @ exact[e].to(grad.dtype)
        start = stop
    assert_within_budget(got, wide, baseline)
    assert not got[start:].any()


def as_stops(stops, device):
    return torch.tensor(stops, dtype=torch.int32, device=device)


@pytest.mark.parametrize("case", CASES)
def test_each_row_is_multiplied_by_its_weight(case, device):
    quant_type, block_size, nested, n, k = CASES[case]
    tensors, exact = stack(quant_type, block_size, nested, n, k, device)
    packed = packed4(tensors, quant_type, block_size)
    config = GradientConfig(block_m=16, block_n=64, block_k=128, warps=4, stages=2)
    for stops in STOPS.values():
        grad = torch.randn(S, n, device=device).half()
        out = torch.full((S, k), float("nan"), device=device).half()
        multiply_by_rows(grad, packed, out, config, as_stops(stops, device))
        check(out, grad, stops, exact)


@pytest.mark.parametrize("k", [64, 50], ids=["multiple-of-32", "other"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double_quant"])
def test_the_launcher_gives_the_gradients_of_the_reference(nested, dtype, k, device):
    (weight, absmax, *scales), exact = stack("nf4", 64, nested, 24, k, device)
    grad = torch.randn(S, 24, device=device).to(dtype)
    for stops in STOPS.values():
        args = (grad, as_stops(stops, device), weight, absmax, *scales, "nf4", 64, k)
        check(grouped_linear_4bit_backward(*args), grad, stops, exact)
        check(reference.grouped_linear_4bit_backward(*args), grad, stops, exact)


def test_what_lies_between_stops_and_rows_is_not_read(device):
    (weight, absmax, *scales), exact = stack("nf4", 64, False, 24, 64, device)
    apart = torch.tensor([[stop, 99] for stop in STOPS["all weights"]], dtype=torch.int32, device=device)[:, 0]
    grad = torch.randn(S, 48, device=device).half()[:, ::2]
    got = grouped_linear_4bit_backward(grad, apart, weight, absmax, *scales, "nf4", 64)
    check(got, grad, STOPS["all weights"], exact)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_tiles_on_a_gpu(dtype, case):
    quant_type, block_size, nested, n, k = CASES[case]
    n, k = 5 * n, 5 * k
    tensors, exact = stack(quant_type, block_size, nested, n, k, "cuda", e=9)
    weight, absmax, *scales = tensors
    for stops in ([0, 1, 1, 20, 84, 85, 300, 690, 690], [0, 0, 0, 0, 700, 700, 700, 700, 700]):
        grad = torch.randn(700, n, device="cuda").to(dtype)
        got = grouped_linear_4bit_backward(
            grad, as_stops(stops, "cuda"), weight, absmax, *scales, quant_type, block_size
        )
        check(got, grad, stops, exact)
        # Two warps, and fewer than 64 rows, take mma.sync, as all GPUs before Hopper do.
        for block_m, block_k, warps in ((64, 128, 4), (64, 256, 8), (128, 128, 8), (64, 128, 2), (16, 128, 4)):
            config = GradientConfig(block_m=block_m, block_n=64, block_k=block_k, warps=warps, stages=3)
            out = torch.full((700, k), float("nan"), device="cuda", dtype=dtype)
            multiply_by_rows(grad, packed4(tensors, quant_type, block_size), out, config, as_stops(stops, "cuda"))
            check(out, grad, stops, exact)


@pytest.mark.gpu
def test_no_whole_weight_is_dequantized():
    e, n, k = 64, 512, 1024
    (weight, absmax, *scales), _ = stack("nf4", 64, False, n, k, "cuda", e=e)
    grad, stops = torch.randn(e, n, device="cuda").bfloat16(), torch.arange(1, e + 1, dtype=torch.int32, device="cuda")
    grouped_linear_4bit_backward(grad, stops, weight, absmax, *scales, "nf4", 64)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grouped_linear_4bit_backward(grad, stops, weight, absmax, *scales, "nf4", 64)
    assert torch.cuda.max_memory_allocated() - before < 2 * n * k  # one of the 64 weights in bfloat16


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param({"grad": torch.zeros(S, 23).half()}, r"expected \[S, N\]", id="width"),
        pytest.param({"grad": torch.zeros(1, S, 24).half()}, r"expected \[S, N\]", id="dimensions"),
        pytest.param({"in_features": 96}, "weight is torch.uint8", id="in_features"),
        pytest.param({"stops": torch.zeros(E, dtype=torch.int64)}, "stops is torch.int64", id="dtype of stops"),
        pytest.param({"absmax": torch.zeros(E, 24, 1).half()}, "absmax is torch.float16", id="cast scales"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(change, message):
    (weight, absmax, *scales), _ = stack("nf4", 64, False, 24, 64, "cpu")
    given = {"grad": torch.zeros(S, 24).half(), "stops": as_stops([0] * E, "cpu"), "absmax": absmax, "in_features": 64}
    given |= change
    for function in (grouped_linear_4bit_backward, reference.grouped_linear_4bit_backward):
        args = (given["grad"], given["stops"], weight, given["absmax"], *scales, "nf4", 64, given["in_features"])
        with pytest.raises(RuntimeError, match=message):
            function(*args)


@pytest.mark.parametrize(
    "change, way, why",
    [
        ({}, "rows", "4.06 rows for each of 126 weights"),
        ({"rows": 512 * 128}, "rows", "512 rows for each of 128 weights"),
        ({"rows": 513 * 128}, "dequantize", "shared by enough rows"),
        ({"rows": 256 * 128, "n": 2056}, "rows", "256 rows for each of 128 weights"),
        ({"rows": 257 * 128, "n": 2056}, "dequantize", "shared by enough rows"),
        ({"dtype": torch.float32}, "one by one", "torch.float32"),
        ({"k": 2050}, "one by one", "no multiple of 32"),
        ({"rows": 0}, "one by one", "Nothing is multiplied"),
    ],
    ids=["few-rows", "small-weights", "many-rows", "large-weights", "many-rows-of-large", "dtype", "width", "empty"],
)
def test_the_way_follows_from_shapes(change, way, why):
    given = {"rows": 512, "e": 128, "n": 1536, "k": 2048, "block_size": 64, "dtype": torch.bfloat16} | change
    choice = choose_gradient(Gpu.named("h200"), **given)
    assert choice.way == way
    assert (choice.config is None) == (way != "rows")
    assert why in choice.why
