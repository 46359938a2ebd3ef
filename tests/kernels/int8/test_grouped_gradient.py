"""The gradient of x in a product with a stack of int8 weights, against that of the dequantized weights row by row."""

import pytest
import torch

from bigq.ops import reference
from bigq.testing import assert_within_budget
from bigq_kernels.choice import GradientConfig
from bigq_kernels.gpu import Gpu
from bigq_kernels.int8.choose_grouped import choose_gradient
from bigq_kernels.int8.grouped_gradient import grouped_linear_int8_backward
from bigq_kernels.int8.rows_times_weight import multiply_by_rows

STOPS = ([2, 5, 6, 9], [0, 4, 4, 9], [1, 3, 3, 7], [0, 0, 0, 0])
S, E = 9, 4


def stack(n, k, device, e=E):
    codes, absmax = reference.quantize_int8(torch.randn(e * n, k, device=device))
    exact = codes.double() * absmax.double() / 127
    return codes.view(e, n, k), absmax.view(e, n, 1), exact.view(e, n, k)


def check(got, grad, stops, exact):
    wide, baseline, start = got.new_zeros(got.shape, dtype=torch.float64), torch.zeros_like(got), 0
    for e, stop in enumerate(stops):
        wide[start:stop] = grad[start:stop].double() @ exact[e]
        baseline[start:stop] = grad[start:stop] @ exact[e].to(grad.dtype)
        start = stop
    assert_within_budget(got, wide, baseline)
    assert not got[start:].any()


@pytest.mark.parametrize("n, k", [(64, 64), (21, 50)], ids=["whole-steps", "partial-steps"])
def test_each_row_is_multiplied_by_its_weight(n, k, device):
    codes, absmax, exact = stack(n, k, device)
    config = GradientConfig(block_m=16, block_n=64, block_k=32, warps=4, stages=2)
    for stops in STOPS:
        grad = torch.randn(S, n, device=device).half()
        out = torch.full((S, k), float("nan"), device=device).half()
        multiply_by_rows(grad, codes, absmax, out, config, torch.tensor(stops, dtype=torch.int32, device=device))
        check(out, grad, stops, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_launcher_gives_the_gradients_of_the_reference(dtype, device):
    codes, absmax, exact = stack(24, 64, device)
    grad = torch.randn(S, 48, device=device).to(dtype)[:, ::2]
    for stops in STOPS:
        args = (grad, torch.tensor(stops, dtype=torch.int32, device=device), codes, absmax.view(torch.int32))
        check(grouped_linear_int8_backward(*args), grad, stops, exact)
        check(reference.grouped_linear_int8_backward(*args), grad, stops, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n, k", [(256, 512), (100, 344)], ids=["whole-steps", "partial-steps"])
def test_tiles_on_a_gpu(n, k, dtype):
    codes, absmax, exact = stack(n, k, "cuda", e=9)
    for stops in ([0, 1, 1, 20, 84, 85, 300, 690, 690], [0, 0, 0, 0, 700, 700, 700, 700, 700]):
        grad, ends = torch.randn(700, n, device="cuda").to(dtype), torch.tensor(stops, dtype=torch.int32, device="cuda")
        check(grouped_linear_int8_backward(grad, ends, codes, absmax), grad, stops, exact)
        for block_m in (16, 64, 128):  # 16 takes mma.sync, as all tiles do on GPUs before Hopper
            out = torch.full((700, k), float("nan"), device="cuda", dtype=dtype)
            config = GradientConfig(block_m=block_m, block_n=64, block_k=128, warps=8, stages=3)
            multiply_by_rows(grad, codes, absmax, out, config, ends)
            check(out, grad, stops, exact)


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param({"grad": torch.zeros(S, 23).half()}, r"expected \[S, N\]", id="width"),
        pytest.param({"codes": torch.zeros(E, 24, 64, dtype=torch.uint8)}, "weight is torch.uint8", id="codes"),
        pytest.param({"absmax": torch.zeros(E, 24, 2)}, "absmax is", id="scales"),
        pytest.param({"stops": torch.zeros(E, dtype=torch.int64)}, "stops is torch.int64", id="stops"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(change, message):
    codes, absmax, _ = stack(24, 64, "cpu")
    grad, stops = torch.zeros(S, 24).half(), torch.zeros(E, dtype=torch.int32)
    given = {"grad": grad, "stops": stops, "codes": codes, "absmax": absmax} | change
    for function in (grouped_linear_int8_backward, reference.grouped_linear_int8_backward):
        with pytest.raises(RuntimeError, match=message):
            function(*given.values())


@pytest.mark.parametrize(
    "change, way",
    [({}, "rows"), ({"rows": 10**6}, "dequantize"), ({"dtype": torch.float32}, "one by one"), ({"n": 0}, "one by one")],
    ids=["few-rows", "many-rows", "dtype", "empty"],
)
def test_the_way_follows_from_shapes(change, way):
    given = {"rows": 512, "e": 128, "n": 1536, "k": 2048, "dtype": torch.bfloat16} | change
    choice = choose_gradient(Gpu.named("h200"), **given)
    assert choice.way == way
    assert (choice.config is None) == (way != "rows")
