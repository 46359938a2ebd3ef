"""The choice of a kernel for a stack of weights, from shapes alone."""

import pytest
import torch

from bigq_kernels.block4.choose_grouped import choose_grouped
from bigq_kernels.gpu import Gpu

MODELS = {  # experts, their N and K, and how many a token has
    "qwen3-30b-a3b": (128, 1536, 2048, 8),
    "mixtral-8x7b": (8, 28672, 4096, 2),
    "gpt-oss-20b": (32, 5760, 2880, 4),
}


@pytest.mark.parametrize(
    "model, ways",
    [
        ("qwen3-30b-a3b", {1: "dp4a", 4: "dp4a", 16: "staged", 64: "staged", 512: "wgmma", 4096: "wgmma"}),
        ("mixtral-8x7b", {1: "dp4a", 4: "staged", 16: "staged", 64: "wgmma", 512: "wgmma", 4096: "wgmma"}),
        ("gpt-oss-20b", {1: "dp4a", 4: "dp4a", 16: "staged", 64: "staged", 512: "wgmma", 4096: "wgmma"}),
    ],
)
def test_ways_by_tokens(model, ways):
    e, n, k, top_k = MODELS[model]
    gpu = Gpu.named("h200")
    chosen = {t: choose_grouped(gpu, t * top_k, e, n, k, 64, torch.bfloat16).way for t in ways}
    assert chosen == ways


def test_tiles_grow_with_the_rows_of_a_weight():
    e, n, k, top_k = MODELS["qwen3-30b-a3b"]
    tiles = [
        choose_grouped(Gpu.named("h100"), t * top_k, e, n, k, 64, torch.bfloat16).config.block_m
        for t in (16, 64, 128, 256, 512, 1024, 4096)
    ]
    assert tiles == sorted(tiles)
    assert (tiles[0], tiles[-1]) == (8, 256)


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
