"""What becomes of outlier columns, with tiles that fit the GPU, and a split that covers K."""

from itertools import product

import pytest
import torch

from bigq_kernels.gpu import Gpu
from bigq_kernels.int8.choose import MAX_SPLIT_TILES, choose
from bigq_kernels.tiles import ceil_div

H100 = Gpu.named("h100")
MODEL_SHAPES = [(1024, 4096), (4096, 4096), (4096, 14336), (14336, 4096), (28672, 8192), (128256, 4096), (5, 30)]
TOKENS = [1, 4, 5, 16, 17, 64, 65, 128, 129, 256, 257, 512, 1024, 1025, 4096]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def cases():
    return product(TOKENS, MODEL_SHAPES, DTYPES, (True, False))


def test_the_split_covers_k():
    for m, (n, k), dtype, outliers in cases():
        config = choose(H100, m, n, k, dtype, outliers).config
        steps, case = ceil_div(k, config.block_k), (m, n, k, dtype, outliers, config)
        assert (config.split - 1) * config.steps_per_split < steps, case
        if config.split > 1:
            assert steps <= config.split * config.steps_per_split, case
            assert config.tiles(m, n) <= MAX_SPLIT_TILES.value, case
        else:
            assert config.steps_per_split in (0, steps), case


@pytest.mark.parametrize("name", ["h100", "a100", "rtx4090"])
def test_programs_fit_the_shared_memory(name):
    gpu = Gpu.named(name)
    for m, (n, k), dtype, outliers in cases():
        config = choose(gpu, m, n, k, dtype, outliers).config
        nbytes, case = config.stages * (config.block_m + config.block_n) * config.block_k, (m, n, k, dtype, outliers)
        if outliers:
            nbytes += 16 * (config.block_m + config.block_n) * 2
        assert nbytes <= gpu.shared_nbytes, case
        assert config.stages >= 2, case


def test_the_way_follows_from_the_threshold_the_tokens_and_the_dtype():
    for m, (n, k), dtype, outliers in cases():
        expected = "planes" if m <= 4 else "tiles" if m <= 128 else "gather"
        if m <= 4 and dtype == torch.float32:  # whose 24 bits two planes do not hold
            expected = "tiles"
        expected = expected if outliers else "codes"
        choice = choose(H100, m, n, k, dtype, outliers)
        assert choice.way == expected, (m, n, k, dtype, outliers)
        assert choice.why.endswith(".")
        if expected == "planes":
            assert choice.config.block_m >= 4 * m, (m, n, k, dtype)


@pytest.mark.parametrize("outliers", [True, False], ids="outliers={}".format)
@pytest.mark.parametrize("gpu", [H100, torch.device("cpu")], ids=["h100", "interpreter"])
@pytest.mark.parametrize(
    "m, n, k, why",
    [
        pytest.param(0, 4096, 4096, "The output is empty: 0 x 4096.", id="no-tokens"),
        pytest.param(3, 0, 4096, "The output is empty: 3 x 0.", id="no-rows"),
        pytest.param(3, 4096, 0, "K = 0: the output is the bias.", id="no-columns"),
    ],
)
def test_an_empty_product_is_answered(m, n, k, why, gpu, outliers):
    choice = choose(gpu, m, n, k, torch.float16, outliers)
    assert (choice.way, choice.config, choice.why) == ("dequantize", None, why)


@pytest.mark.parametrize(
    "m, n, k, split",
    [
        pytest.param(64, 4096, 14336, 2, id="128-tiles-of-112-steps"),
        pytest.param(512, 4096, 14336, 1, id="128-tiles-that-fill-a-multiprocessor-each"),
        pytest.param(512, 4096, 4096, 1, id="128-tiles-of-32-steps"),
        pytest.param(1, 4096, 14336, 2, id="128-tiles-of-56-steps"),
        pytest.param(512, 14336, 4096, 1, id="large-tiles"),
        pytest.param(4096, 4096, 14336, 1, id="1024-tiles"),
        pytest.param(1, 14336, 4096, 1, id="224-tiles"),
    ],
)
def test_k_is_split_where_tiles_leave_multiprocessors_idle(m, n, k, split):
    assert choose(H100, m, n, k, torch.bfloat16, False).config.split == split
