"""Time candidate configurations of the 4-bit linears on this GPU, best first: python bench/tune.py --tokens 4,16.

Prints each shape's best candidates beside the shipped configurations, then what a row of `block4/configs.py` would
be. Kernels are compiled in parallel processes first. The best of many readings is flattered by chance: change a row for
several per cent, and after a second run.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bigq_kernels.block4.bulk_config import TILES, bulk_config, tile_config
from bigq_kernels.block4.configs import (
    BulkConfig,
    SlicedConfig,
    dp4a_config,
    mma_config,
    shape_class,
    sliced_config,
    staged_config,
)
from bigq_kernels.block4.dp4a import linear_4bit_dp4a
from bigq_kernels.block4.gluon.bulk import linear_4bit_bulk
from bigq_kernels.block4.gluon.sliced import linear_4bit_sliced
from bigq_kernels.block4.gluon.staged import linear_4bit_staged
from bigq_kernels.block4.mma import linear_4bit_mma
from bigq_kernels.block4.packed import Packed4
from bigq_kernels.block4.quantize import quantize_4bit
from bigq_kernels.gpu import Gpu
from bigq_kernels.tiles import ceil_div
from bigq_kernels.timing import copies, microseconds

SHAPES = "14336x4096,4096x4096,28672x8192,4096x14336,1024x4096"
STAGED_TILES = {  # by BLOCK_M: (rows of the weight, stages, warps, registers, programs of a multiprocessor)
    8: ((128, 2, 8, 128, 2), (128, 3, 8, 128, 2), (128, 4, 8, 128, 2), (64, 2, 4, 128, 3), (64, 3, 4, 128, 3)),
    16: ((128, 2, 8, 128, 2), (128, 3, 8, 128, 2), (256, 3, 16, 128, 1), (64, 2, 4, None, 3), (64, 3, 4, None, 2)),
    32: ((128, 2, 8, 128, 2), (128, 3, 8, None, 1), (256, 3, 16, 128, 1), (64, 2, 4, None, 2), (64, 3, 4, None, 2)),
}
SLICED_RINGS = {  # by BLOCK_M: (warps, slices of a warp, stages, tiles whose sums are added together, programs)
    8: ((16, 1, 2, 2, 1), (16, 1, 3, 4, 1), (16, 2, 2, 2, 1), (16, 2, 3, 4, 1), (8, 1, 3, 2, 2), (8, 2, 3, 1, 2)),
    16: ((16, 1, 2, 1, 1), (16, 1, 3, 2, 1), (8, 2, 4, 1, 1), (8, 2, 8, 2, 1), (8, 1, 3, 1, 2)),
}
Candidate = tuple[Callable[..., None], Any]


def candidates(m: int, n: int, k: int) -> Iterator[Candidate]:
    """(launcher, configuration), the shipped ones first."""
    gpu = Gpu.of(torch.device("cuda", torch.cuda.current_device()))
    if m <= 16 and k % 256 == 0 and n % 16 == 0 and gpu.capability == (9, 0):
        shipped = sliced_config(gpu, m, n, k)
        if shipped is not None:
            yield linear_4bit_sliced, shipped
        for warps, covers, stages, flush, resident in SLICED_RINGS[8 if m <= 8 else 16]:
            yield (
                linear_4bit_sliced,
                SlicedConfig(
                    block_m=8 if m <= 8 else 16,
                    warps=warps,
                    covers=covers,
                    split=ceil_div(k // 256, warps * covers),
                    stages=stages,
                    flush=flush,
                    programs=resident * gpu.multiprocessors,
                    registers=min(255, 65536 // (32 * warps * resident)),
                ),
            )
    if m <= 2:
        dp4a = dp4a_config(gpu, m, n, k)
        yield linear_4bit_dp4a, dp4a
        for warps, block_n, registers in product((1, 2, 4, 8, 16), (1, 2, 4, 8), (80, 96, 128, 168, 224)):
            resident = 65536 // (32 * warps * registers)  # programs that the registers of a multiprocessor hold
            codes = block_n * ceil_div(k, 1024 * warps)  # chunks of 32 that a thread decodes at a time
            if not (resident and 2 <= codes <= 8 and ceil_div(k, 1024 * warps) * m <= 4):
                continue
            for programs in {resident, ceil_div(resident, 2)}:
                blocks = ceil_div(ceil_div(n, block_n), gpu.multiprocessors * programs)
                changes = {"block_n": block_n, "blocks": blocks, "warps": warps, "registers": registers}
                yield linear_4bit_dp4a, replace(dp4a, **changes)
        return
    if m >= 16 and k % 64 == 0 and gpu.capability == (9, 0):
        shipped = bulk_config(gpu, m, n, k)
        if shipped is not None:
            yield linear_4bit_bulk, shipped
        for rows, split in product(TILES, (1, 2, 4)):
            if rows < 2 * m:
                yield linear_4bit_bulk, tile_config(rows, split)
        yield linear_4bit_bulk, BulkConfig(block_m=32, split=1, stages=4, halves=1)
    if m > 128:
        return
    mma = mma_config(gpu, m, n, k, 64)
    yield linear_4bit_mma, mma
    if m <= 32:
        staged = staged_config(gpu, m, n, k)
        yield linear_4bit_staged, staged
        for block_n, stages, warps, registers, programs in STAGED_TILES[staged.block_m]:
            changes = {"stages": stages, "warps": warps, "registers": registers}
            yield (
                linear_4bit_staged,
                replace(staged, block_n=block_n, programs=programs * gpu.multiprocessors, **changes),
            )
    else:
        for block_n, split, unroll, warps, stages in product((64, 128), (1, 2, 4, 8), (1, 2), (4, 8), (2, 3, 4)):
            changes = {"block_n": block_n, "split": split, "unroll": unroll, "warps": warps, "stages": stages}
            yield linear_4bit_mma, replace(mma, **changes)


def run(candidate: Candidate, x: torch.Tensor, out: torch.Tensor, weight: torch.Tensor, absmax: torch.Tensor) -> None:
    launcher, config = candidate
    launcher(x, Packed4(weight, absmax, (None, None, None), "nf4", 64), None, out, config)


def packed_weight(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_4bit(torch.randn(n, k, device="cuda", dtype=torch.bfloat16), "nf4", 64)


def compile_one(m: int, k: int, candidate: Candidate) -> None:
    """In a process of its own, into Triton's cache, on 256 rows: what is compiled does not depend on how many."""
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    with suppress(Exception):  # `measure` meets it again and says so
        run(candidate, x, x.new_empty(m, 256), *packed_weight(256, k))


def as_compiled(config: Any) -> str:
    """How many steps or blocks of rows a program takes is a run-time argument."""
    at_run_time = {name: 0 for name in ("programs", "blocks") if hasattr(config, name)}
    return str(replace(config, **at_run_time))


def measure(m: int, weights: list[Any], k: int, tried: list[Candidate], shown: int) -> str:
    """Print the candidates' times; the line of the fastest."""
    n = weights[0][0].shape[0]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    out = x.new_empty(m, n)
    run(tried[0], x, out, *weights[0])
    expected = out.float()
    timed = {}
    print(f"{n} x {k}, {m} tokens")
    for candidate in tried:
        try:
            run(candidate, x, out.fill_(torch.nan), *weights[0])
            if not (out.float() - expected).norm() < 5e-3 * expected.norm():
                print(f"       WRONG {describe(candidate)}")
                continue
            timed[candidate] = microseconds([partial(run, candidate, x, out, *w) for w in weights], repeats=10)
        except Exception as error:  # it does not compile, or there is too little shared memory
            print(f"      FAILED {describe(candidate)}: {str(error)[-200:]}")
    for launcher, config in dict(reversed(tried)).items():  # the first of each launcher
        print(f"  shipped {timed.get((launcher, config), float('nan')):7.1f} us  {describe((launcher, config))}")
    lines = [f"{timed[candidate]:7.1f} us  {describe(candidate)}" for candidate in sorted(timed, key=timed.__getitem__)]
    print("\n".join("          " + line for line in lines[:shown]), flush=True)
    return lines[0]


def describe(candidate: Candidate) -> str:
    launcher, config = candidate
    fields = ", ".join(f"{name} {value}" for name, value in vars(config).items())
    return f"{launcher.__name__.removeprefix('linear_4bit_')}: {fields}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=SHAPES, help="NxK, default %(default)s")
    parser.add_argument("--tokens", default="1,2,4,16,32,64", help="default %(default)s")
    parser.add_argument("--best", type=int, default=3, help="how many to print, default %(default)s")
    arguments = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
    tokens = [int(m) for m in arguments.tokens.split(",")]
    print(torch.cuda.get_device_name())

    tried = {(m, n, k): list(dict.fromkeys(candidates(m, n, k))) for (n, k), m in product(shapes, tokens)}
    jobs = {(m, c[0], as_compiled(c[1])): (m, k, c) for (m, _, k), found in tried.items() for c in found}
    begin = perf_counter()
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_one, *zip(*sorted(jobs.values(), key=lambda job: -job[0]), strict=True)))
    print(f"{len(jobs)} kernels compiled in {perf_counter() - begin:.0f} s", flush=True)

    rows = []
    for n, k in shapes:
        weights = [packed_weight(n, k) for _ in range(copies(n * k / 2))]
        for m in tokens:
            best = measure(m, weights, k, tried[m, n, k], arguments.best)
            rows.append(f"{torch.cuda.get_device_capability()} {shape_class(n, k)} {m}: {best}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
