"""Configurations of the 4-bit linears: tables by GPU, shape of the weight and number of tokens.

`bench/tune.py` measures candidates and prints rows. Hopper's rows are the only ones. Other GPUs use them too: they fit
the shared memory and registers from compute capability 8.0 on, where they are correct but not tuned.
"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from bigq_kernels.gpu import Gpu
from bigq_kernels.tiles import ceil_div, next_power_of_2

__all__ = [
    "MAX_DP4A_K",
    "MAX_MMA_M",
    "NARROW_N",
    "STEP",
    "TABLE_NBYTES",
    "BulkConfig",
    "Dp4aConfig",
    "MmaConfig",
    "SlicedConfig",
    "StagedConfig",
    "WgmmaConfig",
    "dp4a_config",
    "mma_config",
    "row_blocks",
    "sliced_config",
    "sliced_stack_config",
    "staged_config",
]

HOPPER = (9, 0)
SHAPES = ("narrow", "middle", "deep", "tall", "wide", "vast", "large")
REGISTERS = 65536  # of a multiprocessor
SPLIT_ROWS = 2.5  # rows that cost a program of the dp4a kernel as much as splitting its tokens
MAX_DP4A_K = 32768  # two chunks of one or two tokens for each of 512 threads, in their registers
MAX_MMA_M = 128  # tokens that `mma` takes where `bulk` does not, in up to 48 % more time
NARROW_N = 2048  # rows of the weight that fill a GPU better with the smaller tiles of `mma`
TABLE_NBYTES = 256 * 32 * 4  # of the Gluon kernels, in shared memory: an entry for a byte and a lane
RESERVED_NBYTES = 2048  # of shared memory, for the system and for Triton
STEP = 256  # elements of K in a step or a slice of the Gluon kernels
SLICED_ROWS = 16  # of a tile of the sliced kernel
# Of the slices that its warps have room for. 4 tokens of 5120 x 5120, with 20 of 32, take 9.3 us, staged 9.7 (H200).
LEAST_SLICES = 0.6
# Of what the programs have room for in the tiles of the busiest one, if they share K. 16 tokens take, with 0.97 of it,
# 57.8 us at 28672 x 8192 and 18.8 at 4096 x 14336, and staged 61.0 and 19.7 (H200). So with 0.91 none would be faster.
LEAST_BUSY_16 = 0.93
LEAST_PROGRAMS = 64  # 1024 x 4096 has as many: 2.6 us for 4 tokens, staged takes 5.9 (H200)


@dataclass(frozen=True, kw_only=True)
class Dp4aConfig:
    """How `linear_4bit_dp4a` divides rows over programs and K over threads."""

    block_n: int  # rows of the weight that a program takes at a time
    blocks: int  # how often it does
    warps: int
    registers: int  # the most a thread may have


@dataclass(frozen=True, kw_only=True)
class MmaConfig:
    """Tile, pipeline and programs along K of `linear_4bit_mma`."""

    block_m: int  # tokens of a tile
    block_n: int  # rows of the weight in a tile
    split: int  # programs along K
    unroll: int  # dots in one iteration
    warps: int
    stages: int  # iterations whose loads are in flight


@dataclass(frozen=True, kw_only=True)
class StagedConfig:
    """Tile, pipeline and programs of `linear_4bit_staged`."""

    block_m: int  # tokens of a tile
    block_n: int  # rows of the weight in a tile
    programs: int  # that share the steps of all tiles
    stages: int  # steps in shared memory
    warps: int
    registers: int | None  # the most a thread may have; None leaves it to ptxas


@dataclass(frozen=True, kw_only=True)
class SlicedConfig:
    """Slices, rings and programs of `linear_4bit_sliced`."""

    block_m: int  # tokens of a tile
    warps: int
    quarters: int = 4  # of 64 elements of K, in a slice
    covers: int  # slices of K that a warp has
    abreast: int = 1  # tiles of 16 rows that the warps have at once
    split: int  # programs that share the slices
    stages: int  # of a warp's ring
    flush: int  # tiles whose sums are added together
    programs: int  # in all
    registers: int  # the most a thread may have
    single: bool = False  # of a stack: each row of the output is a tile, whatever its weight


@dataclass(frozen=True, kw_only=True)
class WgmmaConfig:
    """Tile of `linear_4bit_wgmma`, which multiplies stacks."""

    block_m: int  # tokens of a tile of 128 rows: 32 or 64


@dataclass(frozen=True, kw_only=True)
class BulkConfig:
    """Tile and programs along K of `linear_4bit_bulk`."""

    block_m: int  # tokens of a tile of 128 rows
    split: int  # programs along K
    stages: int  # slices of tokens in shared memory, for each half: 4 or 8
    halves: int = 1  # of the warps, which share K


# fmt: off
# By GPU, M, and chunks of 32 elements of K that a thread holds: (BLOCK_N, registers).
DP4A = {HOPPER: {1: {1: (4, 128), 2: (2, 128), 3: (2, 168)}, 2: {1: (8, 255), 2: (4, 255)}}}
# By GPU and BLOCK_M, for weights of up to so many elements: (BLOCK_N, STAGES, warps, registers, programs of a
# multiprocessor). 4 tokens of 4096 x 4096 take 7.2 us with 64 rows and 12.2 with 128, of 28672 x 8192 55.9 and 53.0.
STAGED: dict[tuple[int, int], dict[int, dict[int, tuple[int, int, int, int | None, int]]]] = {HOPPER: {
    8:  {2**27: (64, 4, 4, 128, 2), 2**62: (128, 3, 8, 128, 2)},
    16: {2**27: (64, 3, 4, None, 2), 2**62: (128, 3, 8, 128, 2)},
    32: {2**25: (64, 2, 4, None, 2), 2**62: (128, 2, 4, None, 2)},
}}
# By GPU and BLOCK_M, for K of up to so many elements: (warps, the most COVERS, STAGES, tiles of 16 rows whose sums are
# added together, programs of a multiprocessor). The registers of a multiprocessor hold 16 tokens of 4096 elements.
SlicedRow = tuple[int, int, int, int, int]
SlicedTable = dict[tuple[int, int], dict[int, dict[int, SlicedRow]]]
SLICED: SlicedTable = {HOPPER: {
    8:  {2048: (8, 1, 2, 2, 2), 4096: (16, 1, 2, 4, 1), 8192: (16, 2, 3, 4, 1), 2**31: (8, 1, 2, 2, 2)},
    16: {2048: (8, 1, 3, 1, 2), 4096: (16, 1, 2, 2, 1), 2**31: (8, 1, 2, 2, 2)},
}}
# The same of stacks. 8 rows for each of 32 weights of 5760 x 2880 take 159 us with 4 warps and 176 with 8 (H200).
STAGED_STACK: dict[tuple[int, int], dict[int, tuple[int, int, int, int | None, int]]] = {
    HOPPER: {8: (128, 3, 8, 128, 2), 16: (128, 3, 4, None, 2), 32: (128, 2, 4, None, 2)},
}
SLICED_STACK: SlicedTable = {HOPPER: {
    8:  {1024: (8, 2, 2, 4, 2), 4096: (8, 2, 3, 4, 2), 2**31: (16, 2, 3, 4, 1)},
    16: {2048: (8, 1, 2, 1, 2), 3072: (16, 1, 2, 2, 1)},
}}
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
# fmt: on


def shape_class(n: int, k: int) -> str:
    """The name in SHAPES of a weight of n x k: by its rows, whose tiles fill a GPU or do not, and by K."""
    if n <= NARROW_N:
        return "narrow"
    if k > 4096:
        return "deep" if n <= 4608 else "tall" if n <= 8192 else "large"
    return "middle" if n <= 8192 else "wide" if n <= 16384 else "vast"


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


def dp4a_config(gpu: Gpu, m: int, n: int, k: int) -> Dp4aConfig:
    """For m of 1 or 2 tokens and a weight of n x k, k <= MAX_DP4A_K."""
    rows = DP4A.get(gpu.capability, DP4A[HOPPER])[m]
    covers = {warps: ceil_div(k, 1024 * warps) for warps in (8, 4, 2, 1, 16)}
    warps = min((w for w in covers if covers[w] in rows), key=lambda w: w * covers[w])  # the fewest idle threads
    block_n, registers = rows[covers[warps]]
    registers = min(registers, REGISTERS // (32 * warps))
    resident = REGISTERS // (32 * warps * registers)
    blocks = row_blocks(ceil_div(n, block_n), gpu.multiprocessors, resident, SPLIT_ROWS / block_n)
    return Dp4aConfig(block_n=block_n, blocks=blocks, warps=warps, registers=registers)


def mma_config(gpu: Gpu, m: int, n: int, k: int, block_size: int) -> MmaConfig:
    """For m <= MAX_MMA_M tokens and a weight of n x k."""
    rows = block_m(m)
    block_n, split, unroll, warps, stages = MMA.get(gpu.capability, MMA[HOPPER])[shape_class(n, k)][rows]
    if n > 65536:
        split = 1
    while split > 1 and ceil_div(k, min(block_size, 64)) < split * 8:  # 8 dots each at least
        split //= 2
    return MmaConfig(block_m=rows, block_n=block_n, split=split, unroll=unroll, warps=warps, stages=stages)


def staged_config(gpu: Gpu, m: int, n: int, k: int, *, is_stack: bool = False) -> StagedConfig:
    """For 3 <= m <= 32 tokens and a weight of n x k, or a stack of these."""
    rows = block_m(m)
    by_size = STAGED.get(gpu.capability, STAGED[HOPPER])[rows]
    row = by_size[min(most for most in by_size if n * k <= most)]
    if is_stack:
        row = STAGED_STACK.get(gpu.capability, STAGED_STACK[HOPPER])[rows]
    block_n, stages, warps, registers, resident = row
    stage_nbytes = STEP // 2 * block_n + STEP * 2 * rows
    while stages > 2 and TABLE_NBYTES + stages * stage_nbytes + RESERVED_NBYTES > gpu.shared_nbytes:
        stages -= 1
    return StagedConfig(
        block_m=rows,
        block_n=block_n,
        programs=resident * gpu.multiprocessors,
        stages=stages,
        warps=warps,
        registers=registers,
    )


def sliced_config(gpu: Gpu, m: int, n: int, k: int) -> SlicedConfig | None:
    """For m tokens and a weight of n x k; None where another way is faster, or this one does not take the weight."""
    config = _sliced(gpu, SLICED, m, n, k, quarters=(4, 3) if k % STEP else (4,), abreast=(1,))
    if config is None or n // SLICED_ROWS * config.split < LEAST_PROGRAMS:
        return None
    if config.split > config.programs:  # K from 65792 on, on a seventh of a GPU, which has 16
        return None
    if config.block_m == 16 and config.split > 1:
        rounds = ceil_div(n // SLICED_ROWS, config.programs // config.split)
        room = config.programs * rounds * 64 * config.quarters * config.covers * config.warps
        if k % STEP or n // SLICED_ROWS * k < LEAST_BUSY_16 * room:
            return None
    return config


def sliced_stack_config(gpu: Gpu, m: int, n: int, k: int, *, single: bool = False) -> SlicedConfig | None:
    """For a stack of weights of n x k, in tiles of m rows of x, or each row by itself; None as `sliced_config`."""
    config = _sliced(gpu, SLICED_STACK, m, n, k, quarters=(4, 3), abreast=(1, 2, 4, 8, 16))
    return None if config is None else replace(config, single=single)


def _sliced(
    gpu: Gpu, table: SlicedTable, m: int, n: int, k: int, *, quarters: tuple[int, ...], abreast: tuple[int, ...]
) -> SlicedConfig | None:
    """By the row that a table has for m tokens and K, if any; None if too many warps would have no slice.

    A slice has one of the numbers of `quarters`, a warp one or two slices, and what K leaves of the warps takes other
    rows of the weight, if `abreast` has more than 1: the way that leaves the fewest warps idle, in the fewest splits.
    K = 2880 is 15 slices of 192, and 768 is 4.
    """
    by_k = table.get(gpu.capability, {}).get(block_m(m), {})
    if k % 32 or k == 0 or k > max(by_k, default=0):
        return None
    warps, most_covers, stages, flush, resident = by_k[min(most for most in by_k if k <= most)]
    ways = [
        (of_slice, covers, tiles)
        for of_slice, covers, tiles in product(quarters, range(most_covers, 0, -1), abreast)
        if tiles <= warps and n % (SLICED_ROWS * tiles) == 0
    ]

    def room(way: tuple[int, int, int]) -> tuple[int, int]:
        """(splits, elements of K that there is room for): the first way with the least of them is taken."""
        of_slice, covers, tiles = way
        elements = 64 * of_slice * covers * warps // tiles
        return ceil_div(k, elements), ceil_div(k, elements) * elements

    if not ways:
        return None
    of_slice, covers, tiles = way = min(ways, key=room)
    split, elements = room(way)
    if k < LEAST_SLICES * elements:
        return None
    return SlicedConfig(
        block_m=block_m(m),
        warps=warps,
        quarters=of_slice,
        covers=covers,
        abreast=tiles,
        split=split,
        stages=stages,
        flush=max(1, flush // tiles),
        programs=resident * gpu.multiprocessors,
        registers=min(255, REGISTERS // (32 * warps * resident)),
    )
