"""choose_grouped: how the rows of x are multiplied by a stack of int8 weights, each by its own, and why.

How many rows each weight has is known on the GPU alone. So the average number of rows of the weights that are hit
decides.

    >>> import torch
    >>> from bigq_kernels.gpu import Gpu
    >>> shapes = {"rows": 512, "e": 128, "n": 1536, "k": 2048}
    >>> choice = choose_grouped(Gpu.named("h200"), **shapes, dtype=torch.bfloat16, outliers=True)
    >>> choice.way, choice.why
    ('tiles', 'With 4.06 rows for each of 126 weights, each program gathers the outlier columns of its tile.')
"""

from functools import lru_cache

import torch

from bigq_kernels.choice import Choice, GradientConfig
from bigq_kernels.gpu import Gpu
from bigq_kernels.groups import weights_hit
from bigq_kernels.int8.choose import MAX_TILES_M, Int8Config, fitted
from bigq_kernels.tiles import ceil_div

__all__ = ["choose_gradient", "choose_grouped", "choose_single"]

MAX_SINGLE_PLANES_M = 16  # tokens, whose rows are tiles of their own
SINGLE_SHARE = 4  # up to one row for each four weights, two rows seldom have the same
MAX_SINGLE_ROWS = 2  # and up to this many whatever the number of weights
# Of a weight, on average, in the gradient of x. Microseconds of the kernel and of dequantizing for grouped_mm (H200):
# 256 rows for each of 128 weights of 1536 x 2048: 702 / 750; 512 for each of 32 of 5760 x 2880: 1626 / 1314. With 64
# rows for these, tiles of 64 / 128 take 421 / 404; with 32 for each of 128 of 1536 x 2048, 212 / 286.
MAX_GRADIENT_ROWS = 256
MAX_GRADIENT_ROWS_64 = 48
MIN_PROGRAMS = 2  # a multiprocessor; fewer take narrower tiles


@lru_cache(maxsize=4096)
def choose_grouped(
    device: torch.device | Gpu, rows: int, e: int, n: int, k: int, dtype: torch.dtype, outliers: bool
) -> Choice[Int8Config | None]:
    """The way of x [rows, k] of `dtype`, sorted by weight, times e int8 weights [n, k], on a device or a `Gpu`."""
    gpu = device if isinstance(device, Gpu) else Gpu.of(device)
    if not (rows and e and n and k):
        return _empty(rows, e, n, k)
    hit = weights_hit(rows, e)
    mean = rows / hit
    each = f"With {mean:.3g} rows for each of {hit} weights"
    block_n = _block_n(gpu, hit, n)
    if mean + mean**0.5 <= 16:
        config = Int8Config(block_m=16, block_n=block_n, block_k=256, warps=4, stages=4, prefetches=2)
    elif mean + mean**0.5 <= 64 or (outliers and dtype == torch.float32):  # see `choose`
        block_n = 32 if dtype == torch.float32 else block_n
        config = Int8Config(block_m=64, block_n=block_n, block_k=128, warps=4, stages=4, prefetches=2)
    else:
        config = Int8Config(block_m=128, block_n=128, block_k=128, warps=4, stages=3)
    config = fitted(config, gpu)
    if not outliers:
        return Choice(way="codes", config=config, why=f"{each}, and without a threshold.")
    if mean <= MAX_TILES_M:
        why = f"{each}, each program gathers the outlier columns of its tile."
        return Choice(way="tiles", config=config, why=why)
    return Choice(way="gather", config=config, why=f"{each}, one launch gathers their outlier columns.")


@lru_cache(maxsize=4096)
def choose_single(
    device: torch.device | Gpu, m: int, rows: int, e: int, n: int, k: int, dtype: torch.dtype, outliers: bool
) -> Choice[Int8Config | None] | None:
    """The way of `rows` rows of x [m, k], multiplied one by one as they come; None if they have to be sorted."""
    gpu = device if isinstance(device, Gpu) else Gpu.of(device)
    if not (rows and e and n and k):
        return _empty(rows, e, n, k)
    if rows > max(MAX_SINGLE_ROWS, e // SINGLE_SHARE):
        return None
    config = Int8Config(block_m=16, block_n=_block_n(gpu, rows, n), block_k=256, warps=4, stages=4, prefetches=2)
    config, each = fitted(config, gpu), f"{rows} rows hardly share one of {e} weights"
    if not outliers:
        return Choice(way="codes", config=config, why=f"{each}, and there is no threshold.")
    if m <= MAX_SINGLE_PLANES_M and dtype != torch.float32:
        return Choice(way="planes", config=config, why=f"{each}; outlier columns are two more int8 rows a token.")
    return Choice(way="tiles", config=config, why=f"{each}; each program gathers the outlier columns of its row.")


@lru_cache(maxsize=4096)
def choose_gradient(
    device: torch.device | Gpu, rows: int, e: int, n: int, k: int, dtype: torch.dtype
) -> Choice[GradientConfig | None]:
    """The way of grad [rows, n] of `dtype`, each row times one of e int8 weights [n, k], on a device or a `Gpu`.

    "rows" decodes in the kernel, "dequantize" all weights before it, and "one by one" each weight that has rows.
    """
    if not (rows and e and n and k):
        why = f"Nothing is multiplied: {rows} rows, {e} weights of {n} x {k}."
        return Choice(way="one by one", config=None, why=why)
    if dtype not in (torch.bfloat16, torch.float16):
        why = f"The gradient is {dtype}, and fused kernels multiply torch.bfloat16 and torch.float16."
        return Choice(way="one by one", config=None, why=why)
    hit = weights_hit(rows, e)
    mean = rows / hit
    each = f"With {mean:.3g} rows for each of {hit} weights"
    if dtype == torch.bfloat16 and k % 8 == n % 8 == 0 and mean > MAX_GRADIENT_ROWS:
        return Choice(
            way="dequantize", config=None, why=f"{each}, enough rows share one dequantization of all weights."
        )
    block_m, warps = (64, 4) if mean <= MAX_GRADIENT_ROWS_64 else (128, 8)
    config = GradientConfig(block_m=block_m, block_n=64, block_k=128, warps=warps, stages=3)
    return Choice(way="rows", config=config, why=f"{each}, decoding in the kernel reads half of the bytes.")


def _block_n(gpu: Gpu, hit: int, n: int) -> int:
    return 64 if hit * ceil_div(n, 64) >= MIN_PROGRAMS * gpu.multiprocessors else 32


def _empty(rows: int, e: int, n: int, k: int) -> Choice[None]:
    return Choice(way="dequantize", config=None, why=f"Nothing is multiplied: {rows} rows, {e} weights of {n} x {k}.")
