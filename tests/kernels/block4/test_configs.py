"""The shipped configurations: complete, within what every GPU has, and a split that covers K and fills a GPU."""

from dataclasses import replace
from itertools import product

import pytest

from bigq_kernels.block4 import configs
from bigq_kernels.block4.configs import (
    MAX_DP4A_K,
    dp4a_config,
    mma_config,
    row_blocks,
    sliced_config,
    staged_config,
)
from bigq_kernels.gpu import Gpu
from bigq_kernels.tiles import ceil_div

H100 = Gpu.named("h100")
MODEL_SHAPES = [(1024, 4096), (4096, 4096), (4096, 14336), (14336, 4096), (28672, 8192), (128256, 4096), (5, 32)]


def test_shape_classes():
    shapes = [(2048, 8192), (8192, 4096), (4608, 4097), (8192, 4097), (16384, 4096), (16385, 4096), (8193, 4097)]
    assert tuple(configs.shape_class(n, k) for n, k in shapes) == configs.SHAPES


def test_every_gpu_has_every_row():
    assert configs.HOPPER in configs.MMA
    assert configs.HOPPER in configs.STAGED
    assert all(list(rows) == [8, 16] for rows in configs.SLICED.values())
    for rows in configs.MMA.values():
        assert tuple(rows) == configs.SHAPES
        assert all(list(row) == [8, 16, 32, 64, 128] for row in rows.values())
    assert all(list(rows) == [8, 16, 32] for rows in configs.STAGED.values())


def test_staged_tiles():
    """16 rows a warp; registers come in eights."""
    for rows in configs.STAGED.values():
        for block_n, stages, warps, registers, _ in (row for by_size in rows.values() for row in by_size.values()):
            assert stages >= 2
            assert block_n % (16 * warps) == 0
            assert registers is None or registers % 8 == 0


@pytest.mark.parametrize("is_stack", [False, True], ids=["weight", "stack"])
@pytest.mark.parametrize("gpu", ["h100", "a100", "rtx4090"])
def test_staged_config(gpu, is_stack):
    tiles = {3: 8, 8: 8, 9: 16, 16: 16, 17: 32, 32: 32}
    for m, (n, k) in product(tiles, MODEL_SHAPES):
        config = staged_config(Gpu.named(gpu), m, n, k, is_stack=is_stack)
        assert config.block_m == tiles[m], (m, n, k)
        assert config.programs % Gpu.named(gpu).multiprocessors == 0
        shared = configs.TABLE_NBYTES + config.stages * (config.block_n * 128 + config.block_m * 512)
        assert shared <= Gpu.named(gpu).shared_nbytes - 2048, (m, n, k)


def test_no_sliced_config_splits_k_over_more_programs_than_a_part_of_a_gpu_has():
    part = replace(H100, multiprocessors=16)
    for m, k in product((1, 8, 16), range(256, 2**17 + 1, 256)):
        config = sliced_config(part, m, 4096, k)
        assert config is None or config.programs >= config.split
    assert sliced_config(part, 1, 4096, 65792) is None
    assert sliced_config(H100, 1, 4096, 65792) is not None


@pytest.mark.parametrize("is_stack", [False, True], ids=["linear", "stack"])
def test_slices_hold_all_of_k_and_a_multiprocessor_what_they_need(is_stack):
    sizes = (*range(64, 4097, 64), 4512, 5120, 6400, 7168, 8192, 11008, 14336, 28672, 53248)
    taken = dict.fromkeys((1, 8, 9, 16), 0)
    for n, k, m in product((16, 1536, 2880, 28672), sizes, taken):
        config, case = (configs.sliced_stack_config if is_stack else sliced_config)(H100, m, n, k), (m, n, k)
        if config is None:
            continue
        taken[m] += 1
        assert config.block_m == (8 if m <= 8 else 16), case
        assert config.stages >= 2, case
        k_warps, resident = config.warps // config.abreast, config.programs // 132
        assert n % (16 * config.abreast) == 0, case
        room = config.split * k_warps * config.covers * config.quarters * 64
        assert configs.LEAST_SLICES * room <= k <= room, case
        tokens = config.covers * config.quarters * config.block_m  # of a warp, in its registers
        assert tokens <= (64 if config.registers <= 128 else 128), case
        assert resident * config.warps * 32 * config.registers <= 65536, case
        sums = 2 * k_warps * config.flush * config.abreast * 16 * config.block_m * 4
        shared = configs.TABLE_NBYTES + max(sums + config.warps * config.stages * 2048, 48 * 1024) + 1024
        assert resident * shared <= 228 * 1024, case
    assert min(taken.values()) > 80


@pytest.mark.parametrize("single", [False, True])
def test_rows_of_a_stack_may_be_tiles_of_their_own(single):
    assert configs.sliced_stack_config(H100, 1, 1536, 2048, single=single).single is single


@pytest.mark.parametrize(
    "make, n, k, slices",
    [
        pytest.param(configs.sliced_stack_config, 1536, 2048, (8, 4, 2), id="qwen3-gate-up"),
        pytest.param(configs.sliced_stack_config, 2048, 768, (4, 3, 4), id="qwen3-down"),
        pytest.param(configs.sliced_stack_config, 5760, 2880, (16, 3, 1), id="gpt-oss"),
        pytest.param(sliced_config, 5120, 2880, (16, 3, 1), id="gpt-oss-attention"),
        pytest.param(sliced_config, 4544, 4544, (32, 3, 1), id="two-slices-of-192"),
        pytest.param(sliced_config, 4096, 2560, (16, 4, 1), id="idle-warps-but-whole-slices"),
        pytest.param(sliced_config, 28672, 8192, (32, 4, 1), id="two-slices-of-256"),
    ],
)
def test_slices_have_the_size_that_leaves_the_fewest_warps_idle(make, n, k, slices):
    """(slices that the warps have room for, quarters of 64 elements in one, tiles of rows at once)."""
    config = make(H100, 8, n, k)
    assert (config.covers * config.warps // config.abreast, config.quarters, config.abreast) == slices


@pytest.mark.parametrize("n, k, split", [(28672, 8192, 4), (4096, 14336, 7), (8192, 28672, 14)])
def test_programs_share_k_where_registers_do_not_hold_16_tokens_of_it(n, k, split):
    config = sliced_config(H100, 16, n, k)
    assert config is not None
    assert config.split == split
    assert config.split * config.warps * config.covers * 256 == k


@pytest.mark.parametrize(
    "m, n, k",
    [
        pytest.param(17, 4096, 4096, id="too-many-tokens"),
        pytest.param(1, 4100, 4096, id="partial-tile"),
        pytest.param(1, 4096, 4112, id="partial-vector"),
        pytest.param(1, 4096, 2304, id="idle-warps"),
        pytest.param(1, 4096, 512, id="many-idle-warps"),
        pytest.param(1, 1008, 4096, id="idle-multiprocessors"),
        pytest.param(16, 5120, 5120, id="idle-warps-and-programs-of-more-tokens-than-registers-hold"),
        pytest.param(16, 4608, 8192, id="idle-programs-of-these"),
        pytest.param(16, 4096, 14304, id="partial-slice-of-these"),
    ],
)
def test_what_slices_do_not_take(m, n, k):
    assert sliced_config(H100, m, n, k) is None


def test_dp4a_config():
    shapes = [*MODEL_SHAPES, (8192, 28672), (4100, 11008), (5000, 4128), (7, MAX_DP4A_K)]
    for m, (n, k) in product((1, 2), shapes):
        config, case = dp4a_config(H100, m, n, k), (m, n, k)
        covers, threads = ceil_div(k, 1024 * config.warps), 32 * config.warps
        assert covers * m <= 4, case  # the tokens of more do not fit the registers
        assert covers * config.block_n <= 8, case  # nor do the codes
        assert threads * config.registers <= 65536, case
        programs = ceil_div(n, config.block_n * config.blocks)
        assert programs <= 132 * (65536 // (threads * config.registers)), case  # all at once


def test_dp4a_has_rows_for_every_k():
    assert configs.HOPPER in configs.DP4A
    for rows in configs.DP4A.values():
        assert list(rows) == [1, 2]
        assert all({1, 2} <= set(by_covers) for by_covers in rows.values())


@pytest.mark.parametrize(
    "n, k, expected",
    [
        pytest.param(4096, 4096, 4, id="128-chunks"),
        pytest.param(4096, 11008, 4, id="344-chunks-in-3-times-128"),
        pytest.param(4096, 14336, 8, id="448-chunks-in-2-times-256"),
        pytest.param(8192, 28672, 16, id="896-chunks-in-2-times-512"),
        pytest.param(4096, 32, 1, id="one-chunk"),
    ],
)
def test_dp4a_leaves_few_threads_idle(n, k, expected):
    assert dp4a_config(H100, 1, n, k).warps == expected


@pytest.mark.parametrize(
    "blocks, resident, expected",
    [
        pytest.param(3584, 5, 7, id="14336x4096"),  # 4 programs of 7 and a half; 5 of 6 and a half are more
        pytest.param(1024, 5, 2, id="4096x4096"),
        pytest.param(256, 5, 1, id="1024x4096"),
        pytest.param(1, 8, 1, id="one"),
        pytest.param(4096, 1, 32, id="one-resident"),
    ],
)
def test_row_blocks(blocks, resident, expected):
    assert row_blocks(blocks, 132, resident, 0.625) == expected


def test_mma_config():
    for m, (n, k), block_size in product((1, 8, 9, 33, 64, 65, 128), MODEL_SHAPES, (32, 64, 4096)):
        config, case = mma_config(H100, m, n, k, block_size), (m, n, k, block_size)
        assert m <= config.block_m < max(2 * m, 9), case
        assert config.split == 1 or ceil_div(k, min(block_size, 64)) >= config.split * 8, case


def test_slices_are_hoppers():
    assert sliced_config(Gpu.named("a100"), 1, 14336, 4096) is None


def test_a_gpu_without_rows_takes_hoppers():
    other = replace(H100, capability=(12, 0))
    for make, m in ((dp4a_config, 1), (staged_config, 8)):
        assert make(other, m, 4096, 4096) == make(H100, m, 4096, 4096)
    assert mma_config(other, 8, 4096, 4096, 64) == mma_config(H100, 8, 4096, 4096, 64)
