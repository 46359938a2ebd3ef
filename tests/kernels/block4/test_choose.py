"""Which kernel multiplies by a 4-bit weight, and the one sentence that says why."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bigq_kernels.block4.choose import choose
from bigq_kernels.block4.configs import MAX_DP4A_K, BulkConfig, Dp4aConfig, MmaConfig, SlicedConfig, StagedConfig
from bigq_kernels.gpu import Gpu

H100 = Gpu.named("h100")
CONFIGS = {
    "sliced": SlicedConfig,
    "dp4a": Dp4aConfig,
    "staged": StagedConfig,
    "bulk": BulkConfig,
    "mma": MmaConfig,
    "dequantize": type(None),
}


def way(m, n=4096, k=4096, block_size=64, dtype=torch.bfloat16, gpu=H100):
    choice = choose(gpu, m, n, k, block_size, dtype)
    assert isinstance(choice.config, CONFIGS[choice.way])
    return choice.way


@pytest.mark.parametrize(
    "question, expected, why",
    [
        pytest.param({"m": 1}, "sliced", "SLICED of configs.py has a row for 1 token and K = 4096", id="one-token"),
        pytest.param({"m": 1, "k": 14336}, "sliced", "a row for 1 token and K = 14336", id="one-token-in-splits"),
        pytest.param({"m": 2, "k": 14336}, "sliced", "a row for 2 tokens and K = 14336", id="two-tokens-in-splits"),
        pytest.param({"m": 16}, "sliced", "a row for 16 tokens and K = 4096", id="sixteen-tokens"),
        pytest.param({"m": 16, "k": 8192}, "sliced", "a row for 16 tokens and K = 8192", id="sixteen-tokens-in-splits"),
        pytest.param({"m": 16, "k": 5120}, "staged", "Up to 32 tokens", id="sixteen-tokens-with-idle-warps"),
        pytest.param({"m": 17}, "staged", "Up to 32 tokens", id="too-many-for-slices"),
        pytest.param({"m": 1, "n": 4100}, "dp4a", "For 1 token and K up to 32768", id="one-token-of-a-partial-tile"),
        pytest.param({"m": 1, "k": 2880}, "sliced", "a row for 1 token and K = 2880", id="slices-of-192"),
        pytest.param(
            {"m": 1, "k": 4064}, "sliced", "a row for 1 token and K = 4064", id="one-token-of-a-partial-slice"
        ),
        pytest.param({"m": 1, "n": 4100, "k": MAX_DP4A_K + 32}, "staged", "Up to 32 tokens", id="one-token-too-long"),
        pytest.param({"m": 2, "n": 4100}, "dp4a", "For 2 tokens and K up to 4096", id="two-tokens"),
        pytest.param({"m": 2, "n": 4100, "k": 4128}, "staged", "Up to 32 tokens", id="two-tokens-too-long"),
        pytest.param({"m": 32}, "staged", "Up to 32 tokens", id="staged"),
        pytest.param({"m": 33}, "bulk", "For 33 tokens, bulk takes about 17 us in tiles of 32, and .* 21", id="bulk"),
        pytest.param({"m": 512}, "bulk", "about 32 us in tiles of 128, and dequantizing 38", id="many"),
        pytest.param({"m": 2049}, "dequantize", "Above 128 tokens", id="cublas"),
        pytest.param({"m": 33, "n": 2048}, "mma", "Up to 64 tokens .* more than 32 tokens", id="narrow"),
        pytest.param({"m": 65, "n": 2048}, "dequantize", "Above 64 tokens", id="too-many-of-narrow"),
        pytest.param({"m": 65, "k": 2880}, "bulk", "For 65 tokens", id="partial-step"),
        pytest.param({"m": 65, "k": 4128}, "dequantize", "Above 64 tokens", id="partial-slice"),
        pytest.param({"m": 3, "block_size": 32}, "mma", "blocks of 64 or more, not 32", id="block-32"),
        pytest.param({"m": 128, "block_size": 32}, "mma", "Up to 128 tokens", id="most-of-mma"),
        pytest.param({"m": 129, "block_size": 32}, "dequantize", "Above 128 tokens", id="too-many-of-mma"),
        pytest.param({"m": 1, "dtype": torch.float32}, "dequantize", r"x is torch\.float32", id="float32"),
        pytest.param({"m": 1, "k": 4100}, "dequantize", "K = 4100 is no multiple of 32", id="odd-columns"),
        pytest.param({"m": 0}, "dequantize", "output is empty: 0 x 4096", id="no-tokens"),
        pytest.param({"m": 1, "n": 0}, "dequantize", "output is empty: 1 x 0", id="no-rows"),
    ],
)
def test_way_and_why(question, expected, why):
    question = {"n": 4096, "k": 4096, "block_size": 64, "dtype": torch.bfloat16} | question
    choice = choose(H100, **question)
    assert choice.way == expected
    assert isinstance(choice.config, CONFIGS[expected])
    assert re.search(why, choice.why), choice.why
    assert choice.why.endswith(".")


@pytest.mark.parametrize("m", [3, 33, 128])
def test_without_gluon_mma_takes_what_the_gluon_kernels_would(m):
    choice = choose(replace(H100, gluon=False), m, 4096, 4096, 64, torch.float16)
    assert choice.way == "mma"
    assert "Gluon kernels do not run" in choice.why


@pytest.mark.parametrize(
    "m, n, expected", [(17, 14336, "staged"), (33, 4096, "mma"), (128, 4096, "mma"), (129, 14336, "dequantize")]
)
def test_without_bulk_others_take_what_it_would(m, n, expected):
    assert way(m, n) == "bulk"
    choice = choose(replace(H100, bulk=False), m, n, 4096, 64, torch.bfloat16)
    assert choice.way == expected
    assert m < 33 or "bulk does not run on this GPU with this release of Triton" in choice.why


def test_the_interpreter_has_no_gluon():
    assert way(8, gpu=torch.device("cpu")) == "mma"


def test_gpus_that_are_not_hopper_have_no_bulk_and_no_slices():
    assert [way(m, gpu=Gpu.named("a100")) for m in (2, 32, 33, 128, 129)] == [
        "dp4a", "staged", "mma", "mma", "dequantize",
    ]  # fmt: skip


@settings(max_examples=300, deadline=None)
@example(gpu=Gpu.named("h100"), m=1, n=1, k=0, block_size=64, dtype=torch.float16)
@given(
    gpu=st.sampled_from([H100, Gpu.named("a100"), Gpu.named("rtx4090"), Gpu.of(torch.device("cpu"))]),
    m=st.integers(0, 3000),
    n=st.integers(0, 200_000),
    k=st.integers(1, 1100).map(lambda words: 32 * words) | st.integers(0, 40_000),
    block_size=st.sampled_from([2**power for power in range(5, 13)]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_every_question_has_an_answer_that_its_kernel_can_run(gpu, m, n, k, block_size, dtype):
    chosen = way(m, n, k, block_size, dtype, gpu)
    if chosen != "dequantize":
        assert m > 0
        assert n > 0
        assert k > 0
        assert k % 32 == 0
        assert dtype != torch.float32
    if chosen in ("sliced", "staged", "bulk"):
        assert gpu.gluon
        assert block_size >= 64
    assert chosen != "sliced" or (m <= 16 and n % 16 == 0 and gpu.capability == (9, 0))
    assert chosen != "dp4a" or m <= 2
    assert chosen != "staged" or m <= 32
    assert chosen != "mma" or m <= 128
    assert chosen != "bulk" or (17 <= m <= 2048 and k % 64 == 0 and gpu.capability == (9, 0))


def test_a_question_is_answered_once():
    choice = choose(H100, 7, 4096, 4096, 64, torch.bfloat16)
    assert choose(Gpu.named("h200"), 7, 4096, 4096, 64, torch.bfloat16) is choice  # the same numbers


@pytest.mark.gpu
@pytest.mark.parametrize("block_size, few", [(32, "mma"), (64, "staged")], ids=["block-32", "block-64"])
def test_this_gpu_takes_what_it_should(block_size, few, device):
    gpu = Gpu.of(device)
    if not gpu.gluon:
        few = "mma"
    ways = [way(m, 1000, block_size=block_size, gpu=device) for m in (2, 3, 32, 33, 65)]
    assert ways == ["dp4a", few, few, "mma", "dequantize"]
    if gpu.gluon and gpu.capability == (9, 0) and block_size == 64:
        assert [way(m, 14336, gpu=device) for m in (1, 16)] == ["sliced"] * 2
        assert [way(m, 14336, gpu=device) for m in (64, 256, 2048, 2049)] == ["bulk"] * 3 + ["dequantize"]
