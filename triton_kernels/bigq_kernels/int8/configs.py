"""Configurations of the int8 linear: its tile by tokens, rows of the weight and dtype, and the split of K.

Few tokens are bound by bytes in flight, many by the tensor cores. Tuned on Hopper only.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton.language as tl
from triton.runtime import driver

from bigq_kernels.block4.configs import split_steps
from bigq_kernels.tiles import ceil_div, next_power_of_2

__all__ = ["MAX_SPLIT_TILES", "Int8Config", "int8_config"]

MAX_SPLIT_TILES = tl.constexpr(1024)  # more fill every GPU
MAX_STAGED_NBYTES = 112 << 10  # of shared memory: a program with more has its multiprocessor to itself
OUTLIERS_NBYTES = 8 << 10  # and outlier columns: 16 of 128 rows and 128 tokens, in 16 bits
MIN_SPLIT_STEPS = 24  # fewer do not pay for the sum: 16 take 34 us instead of 27 (4096 x 4096, 512 tokens)


@dataclass(frozen=True, kw_only=True)
class Int8Config:
    """Tile, pipeline and programs along K of `linear_int8`."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    registers: int | None = None  # most a thread may have
    prefetches: int = 0
    planes: bool = False  # outliers as two more int8 rows a token: block_m holds 4 groups of tokens
    gather: bool = False  # outlier columns in a launch of their own: worth it where many programs read them
    split: int = 1
    steps_per_split: int = 0  # of block_k columns; 0 means all

    def tiles(self, m: int, n: int) -> int:
        """How many tiles m tokens and n rows of the weight make."""
        return ceil_div(m, self.block_m) * ceil_div(n, self.block_n)


@cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory a program may have); an H100's without a GPU, for the interpreter."""
    if device.type != "cuda":
        return 132, 227 << 10
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = driver.active.utils.get_device_properties(index)
    return properties["multiprocessor_count"], properties["max_shared_mem"]


def _tile(m: int, n: int, dtype: torch.dtype, outliers: bool, multiprocessors: int) -> Int8Config:
    if m <= 16 and outliers and dtype != torch.float32:  # whose 24 bits two planes do not hold
        block_m, block_n = 4 * max(4, next_power_of_2(m)), 64 if n > 8192 else 32
        block_k = 256 if block_m == 16 else 128
        return Int8Config(
            block_m=block_m, block_n=block_n, block_k=block_k, warps=4, stages=4, prefetches=2, planes=True
        )
    if m <= 16 and not outliers:  # 128 programs at N = 4096, each with 48 KiB in flight
        return Int8Config(block_m=16, block_n=64 if n > 8192 else 32, block_k=256, warps=4, stages=4, prefetches=2)
    if dtype == torch.float32 and outliers:  # the float32 product has no tensor core: a larger tile spills
        return Int8Config(block_m=64, block_n=32, block_k=128, warps=4, stages=4, gather=m > 128)
    if m <= 64:
        return Int8Config(block_m=64, block_n=64 if n > 8192 else 32, block_k=128, warps=4, stages=4, prefetches=2)
    if m <= 256 or n <= 2048:
        return Int8Config(block_m=128, block_n=64, block_k=128, warps=4, stages=4, gather=m > 128)
    tile = Int8Config(block_m=128, block_n=128, block_k=128, warps=8, stages=3, registers=128, gather=True)
    if tile.tiles(m, n) <= multiprocessors:  # one program each: 81 us at 4096 x 14336, 512 tokens, 87 for two halves
        return replace(tile, stages=4, registers=None)
    return tile  # two programs a multiprocessor: 60 us at 14336 x 4096, 512 tokens, 80 for the one above


def _staged_nbytes(config: Int8Config) -> int:
    return config.stages * (config.block_m + config.block_n) * config.block_k


@cache
def int8_config(device: torch.device, m: int, n: int, k: int, dtype: torch.dtype, outliers: bool) -> Int8Config:
    """For m tokens of `dtype` and a weight of n x k, with or without a threshold for outliers."""
    multiprocessors, shared_nbytes = _gpu(device)
    config = _tile(m, n, dtype, outliers, multiprocessors)
    while _staged_nbytes(config) + OUTLIERS_NBYTES > shared_nbytes and config.stages > 2:
        config = replace(config, stages=config.stages - 1)
    tiles, steps = config.tiles(m, n), ceil_div(k, config.block_k)
    if tiles > MAX_SPLIT_TILES.value or _staged_nbytes(config) > MAX_STAGED_NBYTES:
        return config
    # A partial sum is written and read: as many steps as its bytes are, and some to fill the pipeline again.
    partial = 8 * config.block_m * config.block_n / ((config.block_m + config.block_n) * config.block_k)
    split, steps_per_split = split_steps(tiles, steps, multiprocessors, 4 + partial)
    if steps_per_split < MIN_SPLIT_STEPS:
        return config
    return replace(config, split=split, steps_per_split=steps_per_split)
