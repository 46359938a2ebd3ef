"""The way and the tiles of a stack of int8 weights, from shapes alone."""

from itertools import product

import pytest
import torch

from bigq_kernels.gpu import Gpu
from bigq_kernels.int8.choose_grouped import choose_grouped, choose_single

H200 = Gpu.named("h200")
MODELS = {  # experts, their N and K, and how many a token has
    "qwen3-30b-a3b": (128, 1536, 2048, 8),
    "mixtral-8x7b": (8, 28672, 4096, 2),
    "gpt-oss-20b": (32, 5760, 2880, 4),
}


@pytest.mark.parametrize("model", MODELS)
def test_tiles_grow_with_the_rows_of_a_weight(model):
    e, n, k, top_k = MODELS[model]
    configs = [
        choose_grouped(H200, t * top_k, e, n, k, torch.bfloat16, True).config for t in (4, 16, 64, 512, 4096, 32768)
    ]
    tiles = [config.block_m for config in configs]
    assert tiles == sorted(tiles)
    assert (tiles[0], tiles[-1]) == (16, 128)
    assert all(config.split == 1 for config in configs)  # the partial sums would be those of all tiles there may be


def test_outlier_columns_are_gathered_first_where_many_rows_read_them():
    e, n, k, top_k = MODELS["mixtral-8x7b"]
    ways = {t: choose_grouped(H200, t * top_k, e, n, k, torch.bfloat16, True).way for t in (1, 64, 512, 1024)}
    assert ways == {1: "tiles", 64: "tiles", 512: "tiles", 1024: "gather"}
    assert choose_grouped(H200, 4096, e, n, k, torch.bfloat16, False).way == "codes"


def test_few_rows_are_multiplied_as_they_come():
    e, n, k, _ = MODELS["qwen3-30b-a3b"]
    for m, rows, dtype, outliers, way in (
        (1, 8, torch.bfloat16, True, "planes"),
        (1, 8, torch.bfloat16, False, "codes"),
        (1, 8, torch.float32, True, "tiles"),
        (20, 20, torch.float16, True, "tiles"),
    ):
        choice = choose_single(H200, m, rows, e, n, k, dtype, outliers)
        assert choice.way == way
        assert choice.why.endswith(".")
    assert choose_single(H200, 33, 33, e, n, k, torch.bfloat16, True) is None
    assert choose_single(H200, 2, 2, 2, n, k, torch.bfloat16, True) is not None


@pytest.mark.parametrize("name", ["h100", "a100", "rtx4090"])
def test_programs_fit_the_shared_memory(name):
    gpu = Gpu.named(name)
    for (e, n, k, top_k), t, dtype, outliers in product(
        MODELS.values(), (1, 16, 64, 512, 4096), (torch.float32, torch.bfloat16), (True, False)
    ):
        choices = [choose_grouped(gpu, t * top_k, e, n, k, dtype, outliers)]
        choices.append(choose_single(gpu, t, t * top_k, e, n, k, dtype, outliers) or choices[0])
        for choice in choices:
            config, case = choice.config, (name, n, k, t, dtype, outliers)
            outlier_nbytes = 16 * (config.block_m + config.block_n) * 2 if outliers else 0
            assert config.staged_nbytes() + outlier_nbytes <= gpu.shared_nbytes, case
            assert config.stages >= 2, case


@pytest.mark.parametrize("change", [{"rows": 0}, {"e": 0}, {"n": 0}, {"k": 0}], ids=str)
def test_an_empty_product_takes_no_kernel(change):
    given = {"rows": 8, "e": 4, "n": 64, "k": 64, "dtype": torch.float16, "outliers": True} | change
    for choice in (choose_grouped(H200, **given), choose_single(H200, 1, **given)):
        assert (choice.way, choice.config) == ("dequantize", None)
        assert choice.why.startswith("Nothing is multiplied")
