"""The choice of a kernel for a stack of weights, from shapes alone."""

from dataclasses import replace

import pytest
import torch

from bigq_kernels.block4.choose_grouped import choose_grouped, takes_rows
from bigq_kernels.block4.configs import WgmmaConfig
from bigq_kernels.gpu import Gpu

MODELS = {  # experts, their N and K, and how many a token has
    "qwen3-30b-a3b": (128, 1536, 2048, 8),
    "mixtral-8x7b": (8, 28672, 4096, 2),
    "gpt-oss-20b": (32, 5760, 2880, 4),
}


@pytest.mark.parametrize(
    "model, ways",
    [
        ("qwen3-30b-a3b", {1: "dp4a", 4: "dp4a", 16: "staged", 64: "staged", 512: "wgmma", 4096: "bulk"}),
        ("mixtral-8x7b", {1: "dp4a", 4: "staged", 16: "staged", 64: "wgmma", 256: "bulk", 4096: "bulk"}),
        ("gpt-oss-20b", {1: "dp4a", 4: "dp4a", 16: "staged", 64: "staged", 256: "bulk", 4096: "bulk"}),
    ],
)
@pytest.mark.parametrize("takes_sliced", [True, False])
def test_ways_by_tokens(model, ways, takes_sliced):
    """The sliced kernel has all stacks of few rows a weight whose N is a multiple of 16; others these."""
    e, n, k, top_k = MODELS[model]
    gpu = Gpu.named("h200")
    if takes_sliced:
        stay = {t for t, way in ways.items() if way in ("wgmma", "bulk") or (model, t) == ("qwen3-30b-a3b", 1)}
        ways = {t: way if t in stay else "sliced" for t, way in ways.items()}
    else:
        n += 8
    chosen = {t: choose_grouped(gpu, t * top_k, e, n, k, 64, torch.bfloat16).way for t in ways}
    assert chosen == ways


def test_without_bulk_wgmma_multiplies_many_rows():
    gpu = replace(Gpu.named("h200"), bulk=False)
    for model, (e, n, k, _) in MODELS.items():
        assert choose_grouped(gpu, 4096 * 4, e, n, k, 64, torch.bfloat16).way == "wgmma", model


@pytest.mark.parametrize("rows, single", [(1, True), (2, True), (32, True), (33, False), (512, False)])
def test_few_rows_are_taken_one_by_one_and_not_sorted(rows, single):
    for gpu in ("h200", "a100"):
        choice = choose_grouped(Gpu.named(gpu), rows, 128, 1536, 2048, 64, torch.bfloat16)
        assert takes_rows(choice) is single
        assert choice.way == {"h200": "sliced", "a100": "staged"}[gpu] or (single and choice.way == "dp4a")


@pytest.mark.parametrize("gpu", ["h200", "a100", "rtx4090"])
@pytest.mark.parametrize("model", MODELS)
def test_the_rows_of_one_token_are_taken_one_by_one(model, gpu):
    """So an expert cache serves the calls of one token: the order of its slots changes no bit."""
    e, n, k, top_k = MODELS[model]
    for shape in ((n, k), (k, n // 2)):
        assert takes_rows(choose_grouped(Gpu.named(gpu), top_k, e, *shape, 64, torch.bfloat16))


@pytest.mark.parametrize(
    "rows, e, n, k, way",
    [
        pytest.param(8, 128, 2048, 768, "sliced", id="a-whole-round"),
        pytest.param(8, 128, 1536, 2048, "dp4a", id="half-a-round"),
        pytest.param(2, 8, 28672, 4096, "sliced", id="many-rounds"),
        pytest.param(2, 8, 4096, 14336, "dp4a", id="split"),
        pytest.param(2, 8, 4096, 65536, "sliced", id="split-and-too-long-for-dp4a"),
    ],
)
def test_single_rows_take_sliced_where_it_fills_a_gpu_in_one_launch(rows, e, n, k, way):
    assert choose_grouped(Gpu.named("h200"), rows, e, n, k, 64, torch.bfloat16).way == way


def test_tiles_grow_with_the_rows_of_a_weight():
    e, n, k, top_k = MODELS["qwen3-30b-a3b"]
    tiles = [
        choose_grouped(Gpu.named("h100"), t * top_k, e, n, k, 64, torch.bfloat16).config.block_m
        for t in (16, 64, 128, 256, 512, 1024, 4096)
    ]
    assert tiles == sorted(tiles)
    assert (tiles[0], tiles[-1]) == (8, 256)


@pytest.mark.parametrize("mean, tile", [(13, 32), (28, 32), (29, 64), (96, 64)])
def test_tiles_of_wgmma(mean, tile):
    choice = choose_grouped(Gpu.named("h200"), mean * 128, 128, 1536, 2048, 64, torch.bfloat16)
    assert choice.way == "wgmma"
    assert choice.config == WgmmaConfig(block_m=tile)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"dtype": torch.float32}, "x is torch.float32"),
        ({"k": 2050}, "no multiple of 32"),
        ({"rows": 0}, "output is empty"),
        ({"k": 0}, "K is 0"),
        ({"gpu": "rtx4090", "rows": 30000}, "shared by enough rows"),
    ],
    ids=["dtype", "width", "empty", "no-width", "many-rows-without-wgmma"],
)
def test_what_no_kernel_takes_is_dequantized(change, why):
    given = {"rows": 64, "e": 128, "n": 1536, "k": 2048, "block_size": 64, "dtype": torch.bfloat16} | change
    choice = choose_grouped(Gpu.named(given.pop("gpu", "h100")), **given)
    assert (choice.way, choice.config) == ("dequantize", None)
    assert why in choice.why


def test_blocks_of_32_and_other_gpus_take_mma():
    for gpu, block_size in (("h100", 32), ("a100", 32)):
        choice = choose_grouped(Gpu.named(gpu), 512, 128, 1536, 2048, block_size, torch.float16)
        assert choice.way == "mma"
        assert choice.config.split == 1  # there are enough tiles
