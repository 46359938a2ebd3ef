"""bulk_config: the tiles of `bulk` that take the least time by an estimate, if that is less than dequantizing takes.

The estimates are fitted to times of one H200 (2026-11-30, torch 2.11, Triton 3.6), at 12 shapes of weights and 32 to
1024 tokens.
"""

from bigq_kernels.block4.configs import MAX_MMA_M, NARROW_N, STEP, BulkConfig
from bigq_kernels.gpu import Gpu
from bigq_kernels.tiles import ceil_div

__all__ = ["BLOCK_N", "bulk_config", "bulk_us", "dequantize_us", "tile_config"]

BLOCK_N = 128  # rows of the weight in a tile
MAX_M = 2048  # 4096 tokens of 14336 x 4096 take 652 us, and dequantizing 641
# By the tokens of a tile: microseconds of its slice, stages of tokens, and halves of the warps.
TILES = {32: (0.225, 4, 2), 64: (0.27, 4, 2), 128: (0.42, 8, 1), 256: (0.62, 4, 1)}
START_US = 5.0  # the table, the tiles of tokens, the first copies and the output
SPLIT_US = 0.035  # for each token of a tile, times the programs that share it and two more: 13 for 64 tokens and four
SPLITS = (1, 2, 4)
WEIGHTS_OF_US = 1.58e6  # that are dequantized in a microsecond
FLOP_OF_US = 0.77e9  # of cuBLAS
CUBLAS_M = 128  # tokens of its tiles
MARGIN = 0.97  # of dequantizing's estimate, as neither is exact


def tile_config(block_m: int, split: int = 1) -> BulkConfig:
    """For tiles of 32 to 256 tokens, with the stages that Hopper's shared memory has room for.

    Tiles of few tokens leave registers for twice the warps, which share K.
    """
    _, stages, halves = TILES[block_m]
    return BulkConfig(block_m=block_m, split=split, stages=stages, halves=halves)


def bulk_us(gpu: Gpu, config: BulkConfig, m: int, n: int, k: int) -> float:
    """About how many microseconds `bulk` takes for m tokens and a weight of n x k.

    A multiprocessor has one program at a time.
    """
    programs = _tiles(m, n, config.block_m) * config.split
    slices = 4 * ceil_div(ceil_div(k, STEP), config.split)
    addition = SPLIT_US * config.block_m * (config.split + 2) if config.split > 1 else 0.0
    return START_US + ceil_div(programs, gpu.multiprocessors) * slices * TILES[config.block_m][0] + addition


def dequantize_us(m: int, n: int, k: int) -> float:
    """About how many microseconds one dequantization and cuBLAS take, if output rows are whole 16 bytes."""
    return START_US + n * k / WEIGHTS_OF_US + 2 * CUBLAS_M * ceil_div(m, CUBLAS_M) * n * k / FLOP_OF_US


def bulk_config(gpu: Gpu, m: int, n: int, k: int) -> BulkConfig | None:
    """For m tokens and a weight of n x k; None where another way is faster, and where `bulk` does not run."""
    if k % 64 or m > MAX_M or not gpu.bulk:
        return None
    fitting = [
        tile_config(block_m, split)
        for block_m in TILES
        for split in SPLITS
        # Programs that wait for a multiprocessor would start when the first ones already add.
        if split == 1 or _tiles(m, n, block_m) * split <= gpu.multiprocessors
    ]
    config = min(fitting, key=lambda each: bulk_us(gpu, each, m, n, k))
    # Without whole 16 bytes of an output row cuBLAS is slow: 1024 tokens of 4100 x 11008 take it 331 us.
    is_best = n % 8 != 0 or (m <= MAX_MMA_M and n > NARROW_N)
    if not is_best and bulk_us(gpu, config, m, n, k) >= MARGIN * dequantize_us(m, n, k):
        return None
    if config.block_m == 32 and _tiles(m, n, 32) > gpu.multiprocessors:
        # Without halves, two programs share a multiprocessor: 67.7 us for 28672 x 8192, with halves 70.4.
        return BulkConfig(block_m=32, split=1, stages=4, halves=1)
    return config


def _tiles(m: int, n: int, block_m: int) -> int:
    return ceil_div(n, BLOCK_N) * ceil_div(m, block_m)
