"""choose_grouped: which kernel multiplies the rows of x by a stack of 4-bit weights, each by its own, and why.

How many rows each weight has is known on the GPU alone. So the average number of rows of the weights that are hit
decides.

    >>> import torch
    >>> from bigq_kernels.gpu import Gpu
    >>> choice = choose_grouped(Gpu.named("h200"), rows=128, e=128, n=1536, k=2048, block_size=64, dtype=torch.bfloat16)
    >>> choice.way, choice.why
    ('sliced', 'With 1.58 rows for each of 81 weights, tokens fit the registers of warps that share K, in tiles of 8.')
"""

from dataclasses import replace
from functools import lru_cache

import torch

from bigq_kernels.block4.bulk_config import tile_config
from bigq_kernels.block4.choose import MIN_GLUON_BLOCK, Config
from bigq_kernels.block4.configs import (
    MAX_DP4A_K,
    SLICED_ROWS,
    STEP,
    Dp4aConfig,
    MmaConfig,
    SlicedConfig,
    WgmmaConfig,
    dp4a_config,
    mma_config,
    sliced_stack_config,
    staged_config,
)
from bigq_kernels.choice import Choice, GradientConfig
from bigq_kernels.gpu import Gpu
from bigq_kernels.groups import weights_hit
from bigq_kernels.tiles import ceil_div, next_power_of_2

__all__ = ["choose_gradient", "choose_grouped", "takes_rows"]

MAX_SINGLE_ROWS = 2  # dp4a up to this many rows, whatever the number of weights
SINGLE_SHARE = 4  # sliced takes each row by itself up to one for so many weights
LEAST_BUSY = 0.8  # of the programs, in the last round of tiles
SINGLE_BLOCKS = 4  # 26 us for 32 rows of 128 weights of 1536 x 2048; with as many as fit at once, 34 (H200)
MAX_STAGED_ROWS = 12  # of a weight: with 16, 338 us and 289 of wgmma (8 weights of 28672 x 4096, H200)
MAX_MMA_ROWS = 64
# Of a weight, on average, in the gradient of x. Microseconds of the kernel and of dequantizing for grouped_mm (H200):
# 256 / 512 / 1024 rows for each of 128 weights of 1536 x 2048: 719 and 868, 1303 and 1335, 2469 and 2255, and the
# kernel takes 805 MB less memory; for 32 of 5760 x 2880, which grouped_mm multiplies faster: 945 and 961, 1735 and
# 1389; 512 for 8 of 28672 x 4096: 2966 and 2114. With 64 rows for the second, tiles of 64 / 128 take 369 / 419.
MAX_GRADIENT_ROWS = 256
MAX_GRADIENT_ROWS_OF_SMALL = 512
SMALL_NUMEL = 1 << 22
MAX_GRADIENT_ROWS_64 = 64

# Of a weight, on average, for tiles of 32 in wgmma. With more rows tiles are of 64: a tile runs the loop for the rows
# that it has, so one too large costs less than a second one does.
MAX_WGMMA_ROWS_32 = 28
# Tokens of a tile of bulk: (the fewest rows of a weight on average, the least K). Microseconds of two products in tiles
# of 64 / 128 / 256 and by wgmma (H200): 128 rows for each of 8 of 28672 x 4096, 1081 / 893 / 778 and 894; 64 rows,
# 679 / 561 / 674 and 737; 64 for each of 32 of 5760 x 2880, 427 / 386 / 472 and 455; 32 rows, 291 / 323 / 421 and 308.
# The begin of a program counts where K is short: 64 for each of 128 of 1536 x 2048, 395 / 351 / 440 and 341.
BULK = {256: (96.0, 0), 128: (48.0, 2560), 64: (28.0, 2560)}


@lru_cache(maxsize=4096)
def choose_grouped(
    device: torch.device | Gpu, rows: int, e: int, n: int, k: int, block_size: int, dtype: torch.dtype
) -> Choice[Config | None]:
    """The way of x [rows, k] of `dtype`, each row times one of e 4-bit weights [n, k], on a device or a `Gpu`."""
    gpu = device if isinstance(device, Gpu) else Gpu.of(device)
    if dtype not in (torch.bfloat16, torch.float16):
        return _dequantize(f"x is {dtype}, and fused kernels multiply torch.bfloat16 and torch.float16.")
    if k % 32:
        return _dequantize(f"K = {k} is no multiple of 32, so rows are no whole vectors of 16 bytes.")
    if rows == 0 or n == 0 or e == 0:
        return _dequantize(f"The output is empty: {rows} x {n}.")
    if k == 0:
        return _dequantize("K is 0, so there is nothing to multiply.")
    hit = weights_hit(rows, e)
    mean = rows / hit
    each = f"{mean:.3g} rows for each of {hit} weights"
    takes_gluon = gpu.gluon and block_size >= MIN_GLUON_BLOCK
    if takes_gluon and mean <= MAX_STAGED_ROWS:
        few = max(MAX_SINGLE_ROWS, e // SINGLE_SHARE)
        sliced = sliced_stack_config(gpu, 1 if rows <= few else _tile(mean), n, k, single=rows <= few)
        if sliced is not None and not (sliced.single and _single_rows_prefer_dp4a(sliced, rows, n, k)):
            tiles = "row by row" if sliced.single else f"in tiles of {sliced.block_m}"
            why = f"With {each}, tokens fit the registers of warps that share K, {tiles}."
            return Choice(way="sliced", config=sliced, why=why)
    # Two rows seldom have the same weight then, which dp4a would read twice. 32 rows of 128 weights of 1536 x 2048 take
    # 27 us, and 31 staged; 16 of 32 weights of 5760 x 2880, which leave staged a partial step, 68 and 83 (H200).
    few = max(MAX_SINGLE_ROWS, e // (4 if k % STEP == 0 else 2))
    if rows <= few and k <= MAX_DP4A_K:
        why = f"Up to {few} rows for {e} weights hardly share one, and byte dot products are fastest for single rows."
        return Choice(way="dp4a", config=_dp4a_config(gpu, rows, n, k), why=why)
    if takes_gluon:
        if mean <= MAX_STAGED_ROWS:
            why = f"With {each}, codes that are staged in shared memory are fastest."
            return Choice(way="staged", config=staged_config(gpu, min(_tile(mean), 32), n, k, is_stack=True), why=why)
        if k % 64 == 0 and gpu.capability == (9, 0):
            for tile, (fewest, least_k) in BULK.items():
                if gpu.bulk and mean > fewest and k >= least_k:
                    why = f"With {each}, bulk decodes each weight once for a tile of {tile}."
                    return Choice(way="bulk", config=tile_config(tile), why=why)
            tile = 32 if mean <= MAX_WGMMA_ROWS_32 else 64
            why = f"With {each}, wgmma decodes each weight once for a tile of {tile}."
            return Choice(way="wgmma", config=WgmmaConfig(block_m=tile), why=why)
    if mean <= MAX_MMA_ROWS:
        why = f"With {each}, mma is faster than dequantizing all weights."
        return Choice(way="mma", config=_mma_config(gpu, hit, mean, n, k, block_size), why=why)
    return _dequantize(f"With {each}, one dequantization of all weights is shared by enough rows.")


@lru_cache(maxsize=4096)
def choose_gradient(
    device: torch.device | Gpu, rows: int, e: int, n: int, k: int, block_size: int, dtype: torch.dtype
) -> Choice[GradientConfig | None]:
    """The way of grad [rows, n] of `dtype`, each row times one of e 4-bit weights [n, k], on a device or a `Gpu`.

    "rows" decodes in the kernel, "dequantize" all weights before it, and "one by one" each weight that has rows.
    """
    if not (rows and e and n and k):
        why = f"Nothing is multiplied: {rows} rows, {e} weights of {n} x {k}."
        return Choice(way="one by one", config=None, why=why)
    if dtype not in (torch.bfloat16, torch.float16):
        why = f"The gradient is {dtype}, and fused kernels multiply torch.bfloat16 and torch.float16."
        return Choice(way="one by one", config=None, why=why)
    if k % 32:
        why = f"K = {k} is no multiple of 32, so rows are no whole vectors of 16 bytes."
        return Choice(way="one by one", config=None, why=why)
    hit = weights_hit(rows, e)
    mean = rows / hit
    each = f"{mean:.3g} rows for each of {hit} weights"
    most = MAX_GRADIENT_ROWS_OF_SMALL if n * k <= SMALL_NUMEL else MAX_GRADIENT_ROWS
    if dtype == torch.bfloat16 and k % 8 == n % 8 == 0 and mean > most:
        return _dequantize(f"With {each}, one dequantization of all weights is shared by enough rows.")
    block_m, warps = (64, 4) if mean <= MAX_GRADIENT_ROWS_64 else (128, 8)
    config = GradientConfig(block_m=block_m, block_n=64, block_k=128, warps=warps, stages=3)
    return Choice(way="rows", config=config, why=f"With {each}, decoding in the kernel reads a quarter of the bytes.")


def takes_rows(choice: Choice[Config | None]) -> bool:
    """Whether its launcher takes the weight of each row, in any order; others take where those of each weight end."""
    return choice.way == "dp4a" or (isinstance(choice.config, SlicedConfig) and choice.config.single)


def _single_rows_prefer_dp4a(sliced: SlicedConfig, rows: int, n: int, k: int) -> bool:
    """Whether byte dot products are the better way where each row is a tile: for a split K, or few tiles for a GPU.

    A split is a second launch: for 2 rows of 4096 x 14336 it would save 3 us of 31, and take 6 more of the host. 8 rows
    of 1536 x 2048 are 1.5 rounds of tiles, and take 10.0 us where dp4a takes 9.0; of 2048 x 768 they are one, 7.0 and
    7.5 (H200).
    """
    tiles = rows * n // (SLICED_ROWS * sliced.abreast)
    room = ceil_div(tiles, sliced.programs) * sliced.programs
    return k <= MAX_DP4A_K and (sliced.split > 1 or tiles < LEAST_BUSY * room)


def _tile(mean: float) -> int:
    """Rows of a tile that hold those of most weights, if each row chose its weight at random."""
    return next(m for m in (8, 16, 32, 64, 128) if mean + mean**0.5 <= m or m == 128)


def _dp4a_config(gpu: Gpu, rows: int, n: int, k: int) -> Dp4aConfig:
    config = dp4a_config(gpu, 1, n * rows, k)
    return (
        config if rows <= MAX_SINGLE_ROWS else replace(config, blocks=min(SINGLE_BLOCKS, ceil_div(n, config.block_n)))
    )


def _mma_config(gpu: Gpu, hit: int, mean: float, n: int, k: int, block_size: int) -> MmaConfig:
    config = mma_config(gpu, _tile(mean), n, k, block_size)
    return replace(config, split=max(1, config.split // next_power_of_2(hit)))


def _dequantize(why: str) -> Choice[None]:
    return Choice(way="dequantize", config=None, why=why)
