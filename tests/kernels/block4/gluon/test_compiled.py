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

def build(kernel, capability, dtype, nested, constants, warps):
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    integers = ["M", "N", "PAIRS", "B", "steps_per_split", *(f"t{i}" for i in range(8))]
    signature |= dict.fromkeys([name for name in integers if name in signature], "i32")
    signature |= dict(x_ptr=dtype, weight_ptr="*u8", absmax_ptr="*u8" if nested else "*fp32", bias_ptr=dtype)
    signature |= dict(partial_ptr="*fp32", count_ptr="*i32", out_ptr=dtype)
    constants = dict(BLOCK_SIZE=64) | constants
    tables = ["nested_ptr", "offset_ptr", "code_ptr"]
    if nested:
        signature |= dict.fromkeys(tables, "*fp32")
    else:
        constants |= dict.fromkeys(tables)
    place = kernel.arg_names.index
    aligned = {(place(n),): [["tt.divisibility", 16]] for n, t in signature.items() if t[0] == "*" or n == "PAIRS"}
    source = GluonASTSource(kernel, signature, {(place(n),): v for n, v in constants.items()}, aligned)
    return compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
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
WGMMA = """
import pathlib, subprocess, tempfile, triton
from bigq_kernels.block4.configs import WGMMA
from bigq_kernels.block4.gluon.wgmma import _linear_4bit_wgmma_kernel as kernel

ptxas = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
for block_m, block_n, split, warps, _ in {row for rows in WGMMA[9, 0].values() for row in rows.values()}:
    tile = dict(BLOCK_M=block_m, BLOCK_N=block_n, SPLIT=split)
    built = build(kernel, 90, "*bf16", False, tile, warps)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(built.asm["ptx"])
        ptx.flush()
        command = [ptxas, "-v", "-arch=sm_90a", ptx.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    serialized = "serialized" in said.stdout + said.stderr
    print(built.metadata.shared, built.asm["ptx"].count("wgmma.mma_async"), int(serialized))
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
def test_wgmma_compiles_and_its_products_overlap_with_decoding():
    lines = compiled(WGMMA)
    assert len(lines) >= 5
    for shared, products, serialized in lines:
        assert 48 * 1024 < shared <= (227 - 32) * 1024  # of a multiprocessor; the table is beside it
        assert products == 4 * 4  # a step of 256 elements of K, 16 each
        assert not serialized
