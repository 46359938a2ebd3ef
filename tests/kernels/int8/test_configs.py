"""The shipped configurations: a split that covers K and fills the GPU, and tiles whose counters are all zeroed."""

import pytest
import torch

from bigq_kernels.int8 import configs
from bigq_kernels.int8.configs import MAX_SPLIT_TILES, int8_config
from bigq_kernels.tiles import ceil_div

CPU = torch.device("cpu")
MODEL_SHAPES = [(1024, 4096), (4096, 4096), (4096, 14336), (14336, 4096), (28672, 8192), (128256, 4096), (5, 30)]
TOKENS = [1, 4, 5, 16, 17, 64, 65, 256, 257, 512, 1024, 1025, 4096]


@pytest.mark.parametrize("outliers", [True, False], ids=["outliers", "no-outliers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("n, k", MODEL_SHAPES)
def test_the_split_covers_k(n, k, m, dtype, outliers):
    config = int8_config(CPU, m, n, k, dtype, outliers)
    steps = ceil_div(k, config.block_k)
    assert (config.split - 1) * config.steps_per_split < steps
    assert config.steps_per_split == 0 or steps <= config.split * config.steps_per_split
    if config.split > 1:
        assert config.steps_per_split > 0
        assert config.tiles(m, n) <= MAX_SPLIT_TILES.value


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
    assert int8_config(CPU, m, n, k, torch.bfloat16, False).split == split


@pytest.mark.parametrize("m, planes", [(1, True), (16, True), (17, False)], ids=["one", "most", "more"])
def test_only_a_few_tokens_of_16_bits_have_planes(m, planes):
    assert int8_config(CPU, m, 4096, 4096, torch.float16, True).planes is planes
    assert not int8_config(CPU, m, 4096, 4096, torch.float16, False).planes
    assert not int8_config(CPU, m, 4096, 4096, torch.float32, True).planes


@pytest.mark.parametrize("m, gather", [(128, False), (129, True), (4096, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1024, 4096, 14336])
def test_many_tokens_have_their_outliers_gathered_before(n, dtype, m, gather):
    assert int8_config(CPU, m, n, 4096, dtype, True).gather is gather


@pytest.mark.parametrize("outliers", [True, False], ids=["outliers", "no-outliers"])
@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("n, k", MODEL_SHAPES)
def test_programs_fit_a_gpu_with_little_shared_memory(n, k, m, outliers, monkeypatch):
    monkeypatch.setattr(configs, "_gpu", lambda device: (128, 99 << 10))  # 8.6 and 8.9
    config = int8_config.__wrapped__(CPU, m, n, k, torch.bfloat16, outliers)
    nbytes = config.stages * (config.block_m + config.block_n) * config.block_k
    if outliers:
        nbytes += 16 * (config.block_m + config.block_n) * 2
    assert nbytes <= 99 << 10
    assert config.stages >= 2
