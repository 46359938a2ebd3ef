"""The Gluon kernels compile for GPUs that are not here, with the shared memory and the products they should have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from bigq_kernels.gpu import BULK_RELEASES

RELEASE = tuple(map(int, triton.__version__.split(".")[:2]))
BUILD = """
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon._runtime import GluonASTSource

def build(kernel, capability, dtype, nested, constants, warps, **options):
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    types = dict(x_ptr=dtype, weight_ptr="*u8", absmax_ptr="*u8" if nested else "*fp32", bias_ptr=dtype, out_ptr=dtype)
    types |= dict(partial_ptr="*fp32", count_ptr="*i32", route_ptr="*i32", groups_ptr="*i32")
    numbers = ["M", "N", "PAIRS", "B", "E", "repeat", "steps_per_split", *(f"t{i}" for i in range(8))]
    types |= dict.fromkeys(numbers, "i32")
    signature |= {name: type for name, type in types.items() if name in signature and name not in constants}
    constants = dict(BLOCK_SIZE=64) | constants
    tables = [name for name in ("nested_ptr", "offset_ptr", "code_ptr") if name in kernel.arg_names]
    if nested:
        signature |= dict.fromkeys(tables, "*fp32")
    else:
        constants |= dict.fromkeys(tables)
    place = kernel.arg_names.index
    aligned = {(place(n),): [["tt.divisibility", 16]] for n, t in signature.items() if t[0] == "*" or n == "PAIRS"}
    source = GluonASTSource(kernel, signature, {(place(n),): v for n, v in constants.items()}, aligned)
    return compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps} | options)
"""
STAGED = """
from bigq_kernels.block4.gluon.staged import _linear_4bit_staged_kernel as kernel

cases = (90, 8, 8, "*bf16", False, True), (90, 8, 2, "*bf16", False, True), (80, 32, 3, "*fp16", True, False)
for capability, block_m, stages, *types, even in cases:
    tile = dict(BLOCK_M=block_m, BLOCK_N=64, STAGES=stages, PDL=capability >= 90, EVEN=even, groups_ptr=None)
    built = build(kernel, capability, *types, tile, 4)
    ptx = built.asm["ptx"]
    print(built.metadata.shared, ptx.count("mma.sync.aligned.m16n8k16"), ptx.count("table[32768]"))
"""
SLICED = """
from bigq_kernels.block4.configs import sliced_config, sliced_stack_config
from bigq_kernels.block4.gluon.sliced import _linear_4bit_sliced_kernel as kernel
from bigq_kernels.gpu import Gpu

H200 = Gpu.named("h200")
linears = [(m, n, k, False) for m, n, k in ((8, 8960, 1536), (8, 4096, 4096), (8, 28672, 8192), (16, 4096, 4096))]
linears += [(m, n, k, True) for m, n, k in ((8, 28672, 8192), (8, 4096, 14336), (16, 5120, 2880), (16, 28672, 8192))]
stacks = (8, 2048, 768, False), (8, 28672, 4096, True), (8, 4096, 14336, False), (16, 5760, 2880, False)
for is_stack, cases in ((False, linears), (True, stacks)):
    for m, n, k, given in cases:
        single, nested = is_stack and given, given
        config = sliced_stack_config(H200, m, n, k, single=single) if is_stack else sliced_config(H200, m, n, k)
        tile = dict(BLOCK_M=m, QUARTERS=config.quarters, COVERS=config.covers, ABREAST=config.abreast)
        tile |= dict(SPLIT=config.split, STAGES=config.stages, FLUSH=config.flush, SINGLE=single, WHOLE=k == 4096)
        spread = is_stack or config.quarters < 4 or (config.covers > 1 and nested)
        tile |= dict(EVEN=True, PDL=True, SPREAD=spread)
        tile |= {} if is_stack else dict(route_ptr=None)
        built = build(kernel, 90, "*bf16", nested, tile, config.warps, maxnreg=config.registers)
        ptx = built.asm["ptx"]
        place = config.warps * config.flush * 16 * m * 4
        memory = max(2 * place + config.warps * config.stages * 2048, 49168)
        print(built.metadata.shared - -(-memory // place) * place, ptx.count("bar.sync"), ptx.count("table[32768]"),
              ptx.count("mma.sync.aligned.m16n8k16") - 4 * config.quarters * config.covers * m // 8)
"""
SERIALIZED = """
import subprocess, tempfile
from triton.backends.nvidia.compiler import get_ptxas

ptxas = get_ptxas(90).path  # from Triton 3.9 on there are two for Hopper, and one of them is too old for its PTX

def is_serialized(ptx):
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    return int("serialized" in said.stdout + said.stderr)
"""
WGMMA = (
    SERIALIZED
    + """
from itertools import product
from bigq_kernels.block4.gluon.wgmma import REGISTERS, WARPS, _linear_4bit_wgmma_kernel as kernel

for block_m, nested, even in product((32, 64), (False, True), (False, True)):
    dtype = "*bf16" if nested == even else "*fp16"
    built = build(kernel, 90, dtype, nested, dict(BLOCK_M=block_m, EVEN=even), WARPS, maxnreg=REGISTERS)
    loops = block_m // 32
    print(built.metadata.shared, built.asm["ptx"].count("wgmma.mma_async") - loops * 16,
          is_serialized(built.asm["ptx"]))
"""
)
BULK = (
    SERIALIZED
    + """
from bigq_kernels.block4.bulk_config import tile_config
from bigq_kernels.block4.gluon.bulk import _linear_4bit_bulk_kernel as kernel

cases = (256, 256, 1, True), (256, 64, 1, True), (128, 128, 2, False), (32, 32, 1, True), (64, 32, 1, True)
for block_m, least, split, even in (*cases, (64, 64, 2, False)):  # with scales of a kernel before where K is split
    stages, halves = tile_config(block_m).stages, tile_config(block_m).halves
    tile = dict(BLOCK_M=block_m, BLOCK_N=128, SPLIT=split, LEAST_M=least, STAGES=stages, HALVES=halves, EVEN=even,
                NEW_SCALES=split > 1)
    tile |= {} if least < block_m else dict(groups_ptr=None)
    built = build(kernel, 90, "*bf16", False, tile, 8 * halves)
    memory = halves * (stages * block_m * 128 + 8 * 2 * 2048) + 65536
    parts = sum(size.bit_count() for size in range(least, block_m + 1, least))
    ptx = built.asm["ptx"]
    loops = ptx[ptx.index("wgmma.mma_async") : ptx.rindex("wgmma.mma_async")]
    barriers = loops.count("bar.sync") if least == block_m else 0
    print(built.metadata.shared - -(-memory // (block_m * 128)) * block_m * 128,
          ptx.count("wgmma.mma_async") - parts * 4 * stages, is_serialized(ptx), barriers)
"""
)


def compiled(script):
    """What it prints, line by line."""
    root = Path(__file__).parents[4]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(root / "triton_kernels")
    done = subprocess.run(
        [sys.executable, "-c", BUILD + script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_staged_compiles_for_gpus_that_are_not_here():
    shared, products, tables = zip(*compiled(STAGED), strict=True)
    # Stages of codes and tokens: nothing else, but more than the 48 KiB above which Triton asks for what it needs.
    assert shared == (8 * (64 * 128 + 8 * 512), 6 * 64 * 128 + 2 * 8 * 512, 3 * (64 * 128 + 32 * 512))
    assert all(nbytes > 48 * 1024 for nbytes in shared)
    assert products == (4 * 4, 4 * 4, 4 * 4 * 4)  # 16 slices of K, for every 8 tokens
    assert tables == (1, 1, 1)


@pytest.mark.slow
def test_sliced_compiles_with_rings_where_its_memory_begins_and_no_barrier_for_them():
    lines = compiled(SLICED)
    assert len(lines) == 12
    for other_memory, barriers, tables, other_products in lines:
        assert other_memory == 0  # Triton allocates nothing else, so what the kernel allocates lies at the beginning
        assert barriers == 2  # for the table, and for sums that are added
        assert tables == 1
        assert other_products == 0  # 16 for each slice and 8 tokens


@pytest.mark.slow
def test_wgmma_compiles_and_its_products_overlap_with_decoding():
    lines = compiled(WGMMA)
    assert len(lines) == 8
    for shared, other_products, serialized in lines:
        assert 48 * 1024 < shared <= (227 // 2 - 32 - 1) * 1024  # for two programs, each with its table beside it
        assert other_products == 0  # beside a step's 16 for each loop
        assert not serialized


@pytest.mark.slow
@pytest.mark.skipif(RELEASE not in BULK_RELEASES, reason="its warps would wait for each other")
def test_bulk_compiles_with_its_memory_at_the_beginning_and_its_products_overlap_with_decoding():
    lines = compiled(BULK)
    assert len(lines) == 6
    for other_memory, other_products, serialized, barriers in lines:
        assert barriers == 0  # in the loop, which halves may leave after different numbers of steps
        assert other_memory in (0, 4)  # 4 to tell all warps how many splits have finished a tile
        assert other_products == 0
        assert not serialized
