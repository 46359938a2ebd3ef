"""bulk_config: the least estimated time decides, and nothing is chosen that dequantizing would beat."""

from dataclasses import replace

import pytest

from bigq_kernels.block4.bulk_config import TILES, bulk_config, bulk_us, dequantize_us, tile_config
from bigq_kernels.block4.configs import BulkConfig
from bigq_kernels.gpu import Gpu

H200 = Gpu.named("h200")
# (m, n, k), tile, programs along K: microseconds on one H200.
MEASURED = {
    (64, 4096, 4096): {(32, 2): 16.2, (32, 1): 19.2, (64, 4): 21.4, (64, 1): 21.9},
    (256, 4096, 4096): {(64, 1): 23.3, (128, 1): 31.9, (256, 1): 43.3},
    (512, 4096, 4096): {(128, 1): 33.0, (256, 1): 44.4},
    (32, 14336, 4096): {(32, 1): 19.5},
    (64, 14336, 4096): {(64, 1): 23.0, (32, 1): 36.4, (128, 1): 32.6},
    (128, 14336, 4096): {(128, 1): 31.2, (64, 1): 43.3, (256, 1): 44.7},
    (512, 14336, 4096): {(256, 1): 90.9, (128, 1): 123.8},
    (64, 4096, 14336): {(64, 4): 33.5, (64, 2): 42.4, (32, 2): 36.1, (64, 1): 65.0},
    (256, 4096, 14336): {(64, 1): 69.7, (128, 2): 70.2, (128, 1): 99.8},
    (512, 4096, 14336): {(128, 1): 106.3, (256, 2): 119.6, (256, 1): 147.5},
    (128, 8192, 28672): {(128, 2): 122.5, (64, 1): 132.7},
    (512, 28672, 8192): {(256, 1): 341.0, (128, 1): 416.6},
}


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_estimates_are_near_what_was_measured_and_the_fastest_is_chosen(case):
    times = MEASURED[case]
    for (block_m, split), us in times.items():
        assert bulk_us(H200, tile_config(block_m, split), *case) == pytest.approx(us, rel=0.2)
    chosen = bulk_config(H200, *case)
    assert times[chosen.block_m, chosen.split] < 1.02 * min(times.values())


@pytest.mark.parametrize(
    "m, n, k, bulk_measured, dequantize_measured",
    [
        (512, 4096, 4096, 33.0, 36.4),
        (512, 1024, 4096, 32.3, 13.9),
        (1024, 2048, 4096, 34.7, 30.6),
        (1024, 5120, 5120, 112.0, 86.1),
        (1024, 14336, 4096, 178.3, 189.4),
        (1024, 28672, 8192, 610.1, 749.8),
        (768, 8192, 28672, 579.0, 610.6),
        (4096, 14336, 4096, 652.3, 641.3),
    ],
)
def test_dequantizing_is_left_where_it_is_faster(m, n, k, bulk_measured, dequantize_measured):
    assert dequantize_us(m, n, k) == pytest.approx(dequantize_measured, rel=0.2)
    assert (bulk_config(H200, m, n, k) is not None) == (bulk_measured < dequantize_measured)


def test_output_rows_of_odd_bytes_leave_cublas_no_fast_kernel():
    assert bulk_config(H200, 1024, 2047, 4096) is not None
    assert bulk_config(H200, 1024, 2048, 4096) is None


def test_programs_that_do_not_all_start_at_once_share_multiprocessors_without_halves():
    assert bulk_config(H200, 32, 28672, 8192) == BulkConfig(block_m=32, split=1, stages=4, halves=1)
    assert bulk_config(H200, 32, 14336, 4096) == tile_config(32)


def test_it_is_hoppers_and_takes_whole_slices():
    assert bulk_config(Gpu.named("a100"), 64, 14336, 4096) is None
    assert bulk_config(H200, 64, 14336, 4096 + 64) is not None
    assert bulk_config(H200, 64, 14336, 4096 + 32) is None


def test_fewer_multiprocessors_take_larger_tiles():
    half = replace(H200, multiprocessors=66)
    assert [bulk_config(gpu, 256, 4100, 4096).block_m for gpu in (H200, half)] == [64, 128]


def test_tiles_fit_the_shared_memory_of_a_multiprocessor():
    for block_m in TILES:
        config = tile_config(block_m)
        tokens = config.halves * config.stages * block_m * 128
        rings = config.halves * 8 * 2 * 2048
        assert tokens + 65536 + rings <= 227 * 1024
