"""Configurations of the 4-bit linears: tables by GPU, shape of the weight and number of tokens, and the split of K.

`bench/tune.py` measures candidates and prints rows. A GPU that has no rows takes Hopper's: they fit the shared memory
and registers of every GPU from compute capability 8.0 on, where they are correct but not tuned.
"""

from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch

from bigq_kernels.tiles import ceil_div, next_power_of_2

__all__ = [
    "MAX_DP4A_K",
    "Dp4aConfig",
    "GluonConfig",
    "MmaConfig",
    "WgmmaConfig",
    "dp4a_config",
    "gluon_config",
    "mma_config",
    "row_blocks",
    "split_steps",
    "wgmma_config",
]

HOPPER = (9, 0)
SHAPES = ("narrow", "middle", "deep", "tall", "wide", "vast", "large")
LEAST_OF_1024 = 896  # tokens: tiles cost what full ones do, 737 us at 8192 x 28672, and cuBLAS 508 (512) to 800 (1024)
REGISTERS = 65536  # of a multiprocessor
SPLIT_ROWS = 2.5  # rows that cost a program of the dp4a kernel as much as splitting its tokens
MAX_DP4A_K = 32768  # two chunks of one or two tokens for each of 512 threads, in their registers
STEP = 256  # elements of K in a step of the Gluon kernels
MIN_STEPS = 2  # a program with fewer has nothing to overlap
MIN_PROGRAMS = 2  # a multiprocessor: one does not hide its own latencies, 29.8 us against 24.5 (4096 x 14336, H100)


@dataclass(frozen=True, kw_only=True)
class Dp4aConfig:
    """Rows that a program of `linear_4bit_dp4a` takes at a time, and how often; `registers` caps a thread's."""

    block_n: int
    blocks: int
    warps: int
    registers: int


@dataclass(frozen=True, kw_only=True)
class MmaConfig:
    """Tile, programs along K, unrolled steps and pipeline of `linear_4bit_mma`."""

    block_m: int
    block_n: int
    split: int
    unroll: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True)
class GluonConfig:
    """Tile, programs along K, steps of each, and pipeline of `linear_4bit_gluon`; `registers` caps a thread's."""

    block_m: int
    block_n: int
    split: int
    steps_per_split: int
    stages: int
    warps: int
    registers: int | None


@dataclass(frozen=True, kw_only=True)
class WgmmaConfig:
    """Tile and programs along K of `linear_4bit_wgmma`; `registers` caps a thread's."""

    block_m: int
    block_n: int
    split: int
    warps: int
    registers: int | None


# fmt: off
# By GPU, M, and chunks of 32 elements of K that a thread holds: (BLOCK_N, registers).
DP4A = {HOPPER: {1: {1: (4, 128), 2: (2, 128), 3: (2, 168)}, 2: {1: (8, 255), 2: (4, 255)}}}
# By GPU and BLOCK_M: (BLOCK_N, STAGES, warps, registers).
GLUON: dict[tuple[int, int], dict[int, tuple[int, int, int, int | None]]] = {
    HOPPER: {8: (64, 2, 4, None), 16: (64, 2, 4, None), 32: (64, 2, 4, None)},
}
# By GPU, shape and BLOCK_M: (BLOCK_N, SPLIT, UNROLL, warps, stages).
_ROW_8 = (32, 8, 2, 2, 3)
_DEEP = {8: _ROW_8, 16: (64, 8, 1, 2, 4), 32: (64, 8, 1, 2, 4), 64: (128, 4, 1, 8, 4), 128: (64, 4, 2, 4, 2)}
_WIDE = {8: (32, 4, 2, 2, 3), 16: (64, 8, 1, 2, 4), 32: (64, 4, 1, 4, 4), 64: (128, 2, 1, 8, 4), 128: (64, 1, 1, 4, 3)}
MMA = {HOPPER: {
    "narrow": {8: _ROW_8, 16: _ROW_8, 32: (64, 8, 1, 4, 4), 64: (64, 8, 1, 4, 3), 128: (64, 4, 2, 4, 2)},
    "middle": {8: _ROW_8, 16: (64, 8, 1, 2, 4), 32: (64, 8, 1, 4, 4), 64: (128, 4, 1, 8, 4), 128: (64, 4, 2, 4, 2)},
    "deep":   _DEEP,
    "tall":   _DEEP,
    "wide":   _WIDE,
    "vast":   _WIDE,
    "large":  _WIDE | {32: (64, 4, 1, 2, 4), 64: (128, 4, 1, 8, 4)},
}}
# By GPU, shape and tokens, up to a power of two: (BLOCK_M, BLOCK_N, SPLIT, warps, registers). Without a row another way
# is faster: small weights fill a GPU better with the smaller tiles of MMA, many tokens with the large ones of cuBLAS.
# 128 registers of 8 warps leave room for two programs a multiprocessor, where there are tiles for them.
_W128, _W256 = (128, 128, 1, 8, None), (256, 128, 1, 8, None)
WGMMA: dict[tuple[int, int], dict[str, dict[int, tuple[int, int, int, int, int | None]]]] = {HOPPER: {
    "narrow": {},
    "middle": {64: (64, 64, 2, 4, None), 128: (64, 64, 1, 4, None), 256: (128, 64, 1, 4, None)},
    "deep":   {64: (64, 64, 4, 4, None), 128: (128, 64, 4, 4, None), 256: (128, 64, 2, 4, None)},
    "tall":   {64: (64, 128, 2, 8, None), 128: (128, 128, 2, 8, None), 256: (256, 128, 2, 8, None), 512: _W256,
               1024: _W256},
    "wide":   {64: (64, 128, 1, 8, None), 128: _W128, 256: _W256, 512: _W256},
    "vast":   {32: (32, 64, 1, 4, 128), 64: (64, 128, 1, 8, 128), 128: _W128, 256: _W256, 512: _W256},
    "large":  {32: (32, 64, 2, 4, 128), 64: (64, 128, 1, 8, 128), 128: _W128, 256: _W256, 512: _W256, 1024: _W256},
}}
# For N that leaves cuBLAS no whole 16 bytes of an output row: 1024 tokens of 4100 x 11008 take 176 us, and bf16 331.
UNALIGNED = {512: _W128, 1024: _W256}
# fmt: on

Row = TypeVar("Row")


@cache
def _gpu(device: torch.device) -> tuple[tuple[int, int], int]:
    """(compute capability, multiprocessors); an H100's where there is no GPU, for the interpreter."""
    if device.type != "cuda":
        return HOPPER, 132
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def shape_class(n: int, k: int) -> str:
    """What a weight of n rows has too little of: rows to fill a GPU with tiles, or nothing."""
    if n <= 2048:
        return "narrow"
    if k > 4096:
        return "deep" if n <= 4608 else "tall" if n <= 8192 else "large"
    return "middle" if n <= 8192 else "wide" if n <= 16384 else "vast"


def _row(table: dict[tuple[int, int], dict[str, dict[int, Row]]], device: torch.device, n: int, k: int, m: int) -> Row:
    capability, _ = _gpu(device)
    return table.get(capability, table[HOPPER])[shape_class(n, k)][m]


def block_m(m: int) -> int:
    """Columns of the MMA's narrow side that hold m tokens."""
    return max(8, next_power_of_2(m))


@cache
def row_blocks(blocks: int, multiprocessors: int, resident: int, overhead: float) -> int:
    """Blocks of rows that a program takes: the least work for the multiprocessor that gets most of it.

    A program works for its blocks plus `overhead` of one. All start at once, and at least half of the `resident` ones
    that a multiprocessor holds, which hide each other's latencies: 3584 blocks over 132 multiprocessors that hold 5 are
    7 each for 512 programs, of which the busiest gets 4, where 5 would get 6 each.
    """

    def work(programs: int) -> float:
        each = ceil_div(blocks, multiprocessors * programs)
        return ceil_div(ceil_div(blocks, each), multiprocessors) * (each + overhead)

    return ceil_div(blocks, multiprocessors * min(range(resident, resident // 2, -1), key=work))


@cache
def split_steps(tiles: int, steps: int, multiprocessors: int, overhead: float) -> tuple[int, int]:
    """(programs along K, steps of each): the least work for the multiprocessor that gets most of it.

    A program works for its steps plus `overhead` of one. Programs share a multiprocessor evenly, so how many the
    busiest gets decides, not whether all fit at once: of 224 tiles with 16 steps over 132 multiprocessors it gets 2
    programs of 16 steps, 4 of 8, or 7 of 4, which are 32, 32 and 28 steps; the 7 do not fit at once.
    """
    best = None
    for per_split in range(min(MIN_STEPS, steps), steps + 1):
        split = ceil_div(steps, per_split)
        programs = ceil_div(tiles * split, multiprocessors)
        lonely = programs < MIN_PROGRAMS
        candidate = lonely, programs * (per_split + overhead), split, per_split
        best = candidate if best is None else min(best, candidate)
    assert best is not None
    return best[2:]


@cache
def dp4a_config(device: torch.device, m: int, n: int, k: int) -> Dp4aConfig:
    """For m of 1 or 2 tokens and a weight of n x k, k <= MAX_DP4A_K."""
    capability, multiprocessors = _gpu(device)
    rows = DP4A.get(capability, DP4A[HOPPER])[m]
    covers = {warps: ceil_div(k, 1024 * warps) for warps in (8, 4, 2, 1, 16)}
    warps = min((w for w in covers if covers[w] in rows), key=lambda w: w * covers[w])  # the fewest idle threads
    block_n, registers = rows[covers[warps]]
    registers = min(registers, REGISTERS // (32 * warps))
    resident = REGISTERS // (32 * warps * registers)
    blocks = row_blocks(ceil_div(n, block_n), multiprocessors, resident, SPLIT_ROWS / block_n)
    return Dp4aConfig(block_n=block_n, blocks=blocks, warps=warps, registers=registers)


def mma_config(device: torch.device, m: int, n: int, k: int, groups: int) -> MmaConfig:
    """For m <= 128 tokens and a weight of n x k in `groups` dots along K."""
    rows = block_m(m)
    block_n, split, unroll, warps, stages = _row(MMA, device, n, k, rows)
    if n > 65536:
        split = 1
    while split > 1 and groups < split * 8:
        split //= 2
    return MmaConfig(block_m=rows, block_n=block_n, split=split, unroll=unroll, warps=warps, stages=stages)


@cache
def gluon_config(device: torch.device, m: int, n: int, k: int) -> GluonConfig:
    """For 3 <= m <= 32 tokens and a weight of n x k."""
    rows = block_m(m)
    capability, multiprocessors = _gpu(device)
    block_n, stages, warps, registers = GLUON.get(capability, GLUON[HOPPER])[rows]
    # A partial sum is written and read, which grows with the tokens: 16 tokens of 14336 x 4096 are faster without.
    split, steps_per_split = split_steps(ceil_div(n, block_n), ceil_div(k, STEP), multiprocessors, rows / 16)
    return GluonConfig(
        block_m=rows,
        block_n=block_n,
        split=split,
        steps_per_split=steps_per_split,
        stages=stages,
        warps=warps,
        registers=registers,
    )


def wgmma_config(device: torch.device, m: int, n: int, k: int) -> WgmmaConfig | None:
    """For m tokens and a weight of n x k; None where another way is faster, and on GPUs that are not Hopper."""
    if k % STEP:  # the kernel takes whole steps: with masks it took 70 us at 5000 x 4128 and 256 tokens, and bf16 27
        return None
    capability, _ = _gpu(device)
    tokens = next_power_of_2(m)
    row = WGMMA.get(capability, {}).get(shape_class(n, k), {}).get(tokens)
    if tokens == 1024 and m < LEAST_OF_1024:
        row = None
    if row is None and n % 8 and capability in WGMMA:
        row = UNALIGNED.get(tokens)
    if row is None:
        return None
    block_m, block_n, split, warps, registers = row
    return WgmmaConfig(block_m=block_m, block_n=block_n, split=split, warps=warps, registers=registers)
