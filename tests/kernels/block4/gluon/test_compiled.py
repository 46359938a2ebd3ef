"""The Gluon kernels compile for GPUs that are not here, with the shared memory and the products they should have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BUILD = """
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon._runtime import GluonASTSource

def build(kernel, capability, dtype, nested, constants, warps, **options):
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    types = dict(x_ptr=dtype, weight_ptr="*u8", absmax_ptr="*u8" if nested else "*fp32", bias_ptr=dtype, out_ptr=dtype)
    types |= dict(partial_ptr="*fp32", count_ptr="*i32")
    types |= dict.fromkeys(["M", "N", "PAIRS", "B", "programs", "whole", "rest", "parts", "helped"], "i32")
    types |= dict.fromkeys(["helped_more", "each", "more", *(f"t{i}" for i in range(8))], "i32")
    if kernel.__name__.startswith("_grouped"):
        types["groups_ptr"] = "*i32"
    signature |= {name: type for name, type in types.items() if name in signature}
    constants = dict(BLOCK_SIZE=64) | constants
    tables = ["nested_ptr", "offset_ptr", "code_ptr"]
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
    tile = dict(BLOCK_M=block_m, BLOCK_N=64, STAGES=stages, PDL=capability >= 90, EVEN=even)
    built = build(kernel, capability, *types, tile, 4)
    ptx = built.asm["ptx"]
    print(built.metadata.shared, ptx.count("mma.sync.aligned.m16n8k16"), ptx.count("table[32768]"))
"""
SLICED = """
from bigq_kernels.block4.configs import SLICED
from bigq_kernels.block4.gluon.sliced import _linear_4bit_sliced_kernel as kernel

for block_m, by_slices in SLICED[9, 0].items():
    for warps, covers, stages, flush, resident in by_slices.values():
        slices = dict(COVERS=covers, STAGES=stages, FLUSH=flush)
        for split in (1, 2):
            tile = dict(BLOCK_M=block_m, SPLIT=split, WHOLE=split == 1, PDL=True)
            registers = min(255, 65536 // (32 * warps * resident))
            built = build(kernel, 90, "*bf16", split == 2, tile | slices, warps, maxnreg=registers)
            ptx = built.asm["ptx"]
            memory = max(2 * warps * flush * 16 * block_m * 4 + warps * stages * 2048, 49168)
            place = warps * flush * 16 * block_m * 4
            print(built.metadata.shared - -(-memory // place) * place, ptx.count("bar.sync"), ptx.count("table[32768]"),
                  ptx.count("mma.sync.aligned.m16n8k16") - 16 * covers * block_m // 8)
"""
WGMMA = """
import pathlib, subprocess, tempfile, triton
from bigq_kernels.block4 import choose_grouped
from bigq_kernels.block4.configs import WGMMA
from bigq_kernels.block4.gluon.wgmma import _linear_4bit_wgmma_kernel
from bigq_kernels.block4.gluon.wgmma_rounds import _linear_4bit_rounds_kernel
from bigq_kernels.block4.gluon.wgmma_steps import loops_of

ptxas = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
rows = {row for rows in WGMMA[9, 0].values() for row in rows.values()}
rows |= {(tile, block_n, 0, *rest) for tile, (_, block_n, *rest) in choose_grouped.WGMMA.items()}
for block_m, block_n, resident, warps, registers in rows:
    least, chunk = loops_of(block_m)
    tile = dict(BLOCK_M=block_m, BLOCK_N=block_n, CHUNK=chunk)
    kernel, sizes = _linear_4bit_rounds_kernel, [block_m]
    if not resident:
        kernel, sizes, tile["LEAST_M"] = _linear_4bit_wgmma_kernel, range(least, block_m + 1, least), least
    built = build(kernel, 90, "*bf16", False, tile, warps, maxnreg=registers)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(built.asm["ptx"])
        ptx.flush()
        command = [ptxas, "-v", "-arch=sm_90a", ptx.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    serialized = "serialized" in said.stdout + said.stderr
    parts = sum(size.bit_count() for size in sizes if size.bit_count() <= 2)
    print(built.metadata.shared, built.asm["ptx"].count("wgmma.mma_async") - parts * 16, int(serialized))
"""


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
    assert len(lines) >= 4
    for other_memory, barriers, tables, other_products in lines:
        assert other_memory == 0  # Triton allocates nothing else, so what the kernel allocates lies at the beginning
        assert barriers == 2  # for the table, and for sums that are added
        assert tables == 1
        assert other_products == 0  # 16 for each slice and 8 tokens


@pytest.mark.slow
def test_wgmma_compiles_and_its_products_overlap_with_decoding():
    lines = compiled(WGMMA)
    assert len(lines) >= 5
    for shared, other_products, serialized in lines:
        assert 48 * 1024 < shared <= (227 - 32) * 1024  # of a multiprocessor; the table is beside it
        assert other_products == 0  # 16 in a step of 256 elements of K, of each power of two of each loop's tokens
        assert not serialized
