"""choose: how `linear_int8` treats outlier columns, with which tiles and split of K, and why.

    >>> import torch
    >>> from bigq_kernels.gpu import Gpu
    >>> choice = choose(Gpu.named("h100"), m=16, n=4096, k=4096, dtype=torch.bfloat16, outliers=True)
    >>> choice.way, choice.why
    ('tiles', 'For up to 128 tokens, each program gathers the outlier columns of its tile.')

Few tokens are bound by bytes in flight, many by the tensor cores. Tuned on Hopper only. The ways:

- "codes": without a threshold there are no outliers.
- "planes": outlier columns are two more int8 rows a token, of the same product.
- "tiles": each program gathers the outlier columns of its tile.
- "gather": a launch gathers them for all programs first. Up to 512 tokens, each program gathers up to four itself.
- "dequantize": the product is empty, so no kernel of this package runs.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton.language as tl

from bigq_kernels.choice import Choice
from bigq_kernels.gpu import Gpu
from bigq_kernels.split_k import split_steps
from bigq_kernels.tiles import ceil_div

__all__ = ["MAX_SPLIT_TILES", "MAX_TILES_M", "Int8Config", "choose", "fitted"]

MAX_PLANES_M = 4  # whose three rows each fill the least tile of a tensor core
MAX_TILES_M = 128  # more tokens make so many programs that gathering once pays
MAX_SPLIT_TILES = tl.constexpr(1024)  # as many counters are zeroed; fewer tiles than these fill every GPU
MAX_STAGED_NBYTES = 112 << 10  # of shared memory: a program with more has its multiprocessor to itself
OUTLIERS_NBYTES = 8 << 10  # and outlier columns: 16 of 128 rows and 128 tokens, in 16 bits
MIN_SPLIT_STEPS = 24  # fewer do not pay for the sum: 16 take 34 us instead of 27 (4096 x 4096, 512 tokens)


@dataclass(frozen=True, kw_only=True)
class Int8Config:
    """Tile, pipeline and programs along K of `linear_int8`."""

    block_m: int  # tokens of a tile; with planes 4 groups of tokens
    block_n: int  # rows of the weight in a tile
    block_k: int  # columns in a step
    warps: int
    stages: int  # steps in shared memory
    prefetches: int = 0  # pieces of 512 bytes of each row that are brought to L2 before x is quantized
    split: int = 1  # programs along K
    steps_per_split: int = 0  # of block_k columns; 0 means all

    def tiles(self, m: int, n: int) -> int:
        """How many tiles m tokens and n rows of the weight make."""
        return ceil_div(m, self.block_m) * ceil_div(n, self.block_n)

    def staged_nbytes(self) -> int:
        """Bytes of codes that a program has in shared memory."""
        return self.stages * (self.block_m + self.block_n) * self.block_k


def _way(m: int, dtype: torch.dtype, outliers: bool) -> tuple[str, str]:
    """(way, why)."""
    if not outliers:
        return "codes", "The threshold is 0, so there are no outlier columns."
    if m <= MAX_PLANES_M and dtype != torch.float32:  # whose 24 bits two planes do not hold
        return "planes", f"For up to {MAX_PLANES_M} tokens of 16 bits, outlier columns are two more int8 rows a token."
    if m <= MAX_TILES_M:
        return "tiles", f"For up to {MAX_TILES_M} tokens, each program gathers the outlier columns of its tile."
    return "gather", f"Above {MAX_TILES_M} tokens, so many programs read outlier columns that one launch gathers them."


def _tile(way: str, m: int, n: int, dtype: torch.dtype, multiprocessors: int) -> Int8Config:
    block_n = 64 if n > 8192 else 32
    if m <= 16 and (way in ("codes", "planes") or dtype != torch.float32):
        # 128 programs at N = 4096, each with 48 KiB in flight. Of 64 rows, two programs fit a multiprocessor with four
        # stages, and three with three. Where there are more than two, three are faster: one token of 28672 x 8192 takes
        # 61 us, and 72 with four stages; of 14336 x 4096 it takes 20.1 and 19.1 (H200).
        stages = 3 if n > 2 * 64 * multiprocessors else 4
        return Int8Config(block_m=16, block_n=block_n, block_k=256, warps=4, stages=stages, prefetches=2)
    if dtype == torch.float32 and way != "codes":  # the float32 product has no tensor core: a larger tile spills
        return Int8Config(block_m=64, block_n=32, block_k=128, warps=4, stages=4)
    if m <= 64:
        if n >= 128 * multiprocessors:  # a tile reads its tokens for twice as many rows: 71 us, and 82 (28672 x 8192)
            block_n = 128
        return Int8Config(block_m=64, block_n=block_n, block_k=128, warps=4, stages=4, prefetches=2)
    tile = Int8Config(block_m=128, block_n=128, block_k=128, warps=4, stages=3)
    if tile.tiles(m, n) >= multiprocessors:  # two fit each: 256 tokens of 14336 x 4096 take 34 us, 39 in halves (H200)
        return tile
    if m <= 256 or n <= 2048:
        return Int8Config(block_m=128, block_n=64, block_k=128, warps=4, stages=4)
    return replace(tile, warps=8, stages=4)  # one program each: 81 us at 4096 x 14336, 512 tokens, 87 for two halves


def fitted(config: Int8Config, gpu: Gpu) -> Int8Config:
    """The same with as many stages as its codes and outlier columns have room for in shared memory, 2 at least."""
    while config.staged_nbytes() + OUTLIERS_NBYTES > gpu.shared_nbytes and config.stages > 2:
        config = replace(config, stages=config.stages - 1)
    return config


@lru_cache(maxsize=4096)  # a linear asks at each call; a server meets many numbers of tokens
def choose(
    device: torch.device | Gpu, m: int, n: int, k: int, dtype: torch.dtype, outliers: bool
) -> Choice[Int8Config | None]:
    """The way of x [m, k] of `dtype` times int8 [n, k], with or without a threshold, on a device or a `Gpu`."""
    if m == 0 or n == 0:
        return Choice(way="dequantize", config=None, why=f"The output is empty: {m} x {n}.")
    if k == 0:
        return Choice(way="dequantize", config=None, why="K = 0: the output is the bias.")
    gpu = device if isinstance(device, Gpu) else Gpu.of(device)
    way, why = _way(m, dtype, outliers)
    config = fitted(_tile(way, m, n, dtype, gpu.multiprocessors), gpu)
    tiles, steps = config.tiles(m, n), ceil_div(k, config.block_k)
    if tiles <= min(gpu.multiprocessors, MAX_SPLIT_TILES.value) and config.staged_nbytes() <= MAX_STAGED_NBYTES:
        # A partial sum is written and read: as many steps as its bytes are, and some to fill the pipeline again.
        partial = 8 * config.block_m * config.block_n / ((config.block_m + config.block_n) * config.block_k)
        split, steps_per_split = split_steps(tiles, steps, gpu.multiprocessors, 4 + partial)
        if steps_per_split >= MIN_SPLIT_STEPS:
            config = replace(config, split=split, steps_per_split=steps_per_split)
    return Choice(way=way, config=config, why=why)
