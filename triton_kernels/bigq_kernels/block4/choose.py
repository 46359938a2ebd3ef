"""choose: which kernel multiplies by a 4-bit weight, with which configuration, and why. Nothing else decides.

    >>> import torch
    >>> from bigq_kernels.gpu import Gpu
    >>> choice = choose(Gpu.named("h100"), m=1, n=896, k=4864, block_size=64, dtype=torch.bfloat16)
    >>> choice.way, choice.why
    ('dp4a', 'For 1 token and K up to 32768, byte dot products are fastest.')

The ways are "sliced", "dp4a", "staged", "bulk" and "mma", which are modules here and in `gluon`, and "dequantize": the
whole weight is dequantized, and cuBLAS multiplies by it. "sliced", "staged" and "bulk" are Gluon. Where these do not
run (in the interpreter, with other releases of Triton, for blocks of 32), "mma" takes up to 48 % longer (14336 x 4096,
128 tokens, one H100), and "dequantize" above 128 tokens up to 92 % (28672 x 8192, 256 tokens).
"""

from functools import lru_cache

import torch

from bigq_kernels.block4.bulk_config import bulk_config, bulk_us, dequantize_us
from bigq_kernels.block4.configs import (
    MAX_DP4A_K,
    MAX_MMA_M,
    NARROW_N,
    BulkConfig,
    Dp4aConfig,
    MmaConfig,
    SlicedConfig,
    StagedConfig,
    WgmmaConfig,
    dp4a_config,
    mma_config,
    shape_class,
    sliced_config,
    staged_config,
)
from bigq_kernels.choice import Choice
from bigq_kernels.gpu import Gpu

__all__ = ["choose"]

# By M: the longest K for dp4a, whose work is done for each token where the tensor core's decode is shared: two tokens
# take 6.8 us here against 10.4 at 4096 x 4096, but 116 against 76 at 8192 x 28672 (H100).
DP4A_MAX_K = {1: MAX_DP4A_K, 2: 4096}
MAX_STAGED_M = 32  # at 64, 51 us against 45 of the kernel without shared memory (14336 x 4096, H100)
MIN_BULK_M = 17
BULK_SHAPES = ("tall", "wide", "vast", "large")  # of whose tiles there are enough for a GPU at 17 to 32 tokens
MAX_MMA_M_PARTIAL = 64  # likewise if N is too small to fill the GPU, or K leaves a partial step
MIN_GLUON_BLOCK = 64

Config = SlicedConfig | Dp4aConfig | StagedConfig | WgmmaConfig | BulkConfig | MmaConfig


@lru_cache(maxsize=4096)  # a linear asks at each call; a server meets many numbers of tokens
def choose(
    device: torch.device | Gpu, m: int, n: int, k: int, block_size: int, dtype: torch.dtype
) -> Choice[Config | None]:
    """The way of x [m, k] of `dtype` times a 4-bit weight [n, k] in blocks of `block_size`, on a device or a `Gpu`."""
    gpu = device if isinstance(device, Gpu) else Gpu.of(device)
    if dtype not in (torch.bfloat16, torch.float16):
        return _dequantize(f"x is {dtype}, and fused kernels multiply torch.bfloat16 and torch.float16.")
    if k % 32:
        return _dequantize(f"K = {k} is no multiple of 32, so rows are no whole vectors of 16 bytes.")
    if m == 0 or n == 0:
        return _dequantize(f"The output is empty: {m} x {n}.")
    if k == 0:
        return _dequantize("K is 0, so there is nothing to multiply.")
    tokens = "1 token" if m == 1 else f"{m} tokens"
    takes_gluon = gpu.gluon and block_size >= MIN_GLUON_BLOCK
    sliced = sliced_config(gpu, m, n, k) if takes_gluon else None
    longest = DP4A_MAX_K.get(m, 0)
    # A split is a second launch, 6 us more of host time where it is replayed. But 1 token of 4096 x 14336 takes the GPU
    # 12.8 us so, and 16.1 with dp4a; of 2048 x 8960 6.1 and 9.8 (H200).
    if sliced is not None:
        why = f"The table SLICED of configs.py has a row for {tokens} and K = {k} on this GPU."
        return Choice(way="sliced", config=sliced, why=why)
    if k <= longest:
        why = f"For {tokens} and K up to {longest}, byte dot products are fastest."
        return Choice(way="dp4a", config=dp4a_config(gpu, m, n, k), why=why)
    if not gpu.gluon:
        no_gluon = "the Gluon kernels do not run on this GPU with this release of Triton"
    elif not takes_gluon:
        no_gluon = f"the Gluon kernels want blocks of {MIN_GLUON_BLOCK} or more, not {block_size}"
    else:
        fewest = MIN_BULK_M if shape_class(n, k) in BULK_SHAPES else MAX_STAGED_M + 1
        bulk = bulk_config(gpu, m, n, k) if m >= fewest else None
        if bulk is not None:
            taken = f"{bulk_us(gpu, bulk, m, n, k):.0f} us in tiles of {bulk.block_m}"
            why = f"For {tokens}, bulk takes about {taken}, and dequantizing {dequantize_us(m, n, k):.0f}."
            return Choice(way="bulk", config=bulk, why=why)
        if m <= MAX_STAGED_M:
            why = f"Up to {MAX_STAGED_M} tokens, codes that are staged in shared memory are fastest."
            return Choice(way="staged", config=staged_config(gpu, m, n, k), why=why)
        no_gluon = f"there are more than {MAX_STAGED_M} tokens, for which bulk " + (
            "is estimated to take longer" if gpu.bulk else "does not run on this GPU with this release of Triton"
        )
    most = MAX_MMA_M if n > NARROW_N and k % 64 == 0 else MAX_MMA_M_PARTIAL
    if m > most:
        return _dequantize(f"Above {most} tokens of this weight cuBLAS is faster than mma, and {no_gluon}.")
    why = f"Up to {most} tokens of this weight mma is faster than cuBLAS, and {no_gluon}."
    return Choice(way="mma", config=mma_config(gpu, m, n, k, block_size), why=why)


def _dequantize(why: str) -> Choice[None]:
    return Choice(way="dequantize", config=None, why=why)
