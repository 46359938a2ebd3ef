"""The int8 product compiles for GPUs that are not here: the interpreter takes code that Triton's compiler does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BUILD = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from bigq_kernels.int8.product import _linear_int8_kernel as kernel

PLACES = {"one": {}, "groups": {"groups_ptr": "*i32"}, "ids": {"ids_ptr": "*i64"}}
LISTS = {"count_ptr": "*i32", "column_ptr": "*i32"}
TABLES = {"rest_ptr": "*bf16", "dense_ptr": "*bf16", "total_ptr": "*i32"}
for capability, place, way, block_m in (
    (90, "groups", "tiles", 16), (90, "groups", "gather", 128), (90, "ids", "planes", 16), (90, "one", "segments", 16),
    (80, "one", "codes", 16),
):
    pointers = dict.fromkeys(("codes_ptr", "weight_ptr"), "*i8") | dict.fromkeys(("scale_ptr", "absmax_ptr"), "*fp32")
    pointers |= dict.fromkeys(("x_ptr", "out_ptr", "bias_ptr"), "*bf16") | PLACES[place]
    pointers |= {"segment_ptr": "*i32"} if way == "segments" else {}
    pointers |= (LISTS if way in ("tiles", "gather") else {}) | (TABLES if way == "gather" else {})
    numbers = dict.fromkeys(("M", "N", "K", "E", "repeat", "segments", "split", "k_per_split"), "i32")
    constants = dict(
        SEGMENT=128, SEGMENTS=32, CAPACITY=128, PLANES=way == "planes", EVEN_K=True, PDL=capability >= 90,
        PREFETCHES=2 if capability >= 90 else 0, BLOCK_M=block_m, BLOCK_N=64, BLOCK_K=128, BLOCK_OUTLIERS=16,
        BLOCK_SEGMENTS=4, GROUP_M=8,
    )
    constants |= {name: None for name in kernel.arg_names if name.endswith("_ptr") and name not in pointers}
    assert {*pointers, *numbers, *constants} == {*kernel.arg_names}
    types = pointers | numbers | dict.fromkeys(constants, "constexpr")
    index = kernel.arg_names.index
    aligned = {(index(name),): [["tt.divisibility", 16]] for name in (*pointers, "N", "K")}
    signature = {name: types[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(index(name),): value for name, value in constants.items()}, aligned)
    options = {"num_warps": 4, "num_stages": 3, "launch_pdl": capability >= 90}
    built = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = built.asm["ptx"]
    print(built.metadata.shared, ptx.count("s32.s8.s8"), ptx.count("griddepcontrol.wait"))
"""


@pytest.mark.slow
def test_every_place_of_a_program_compiles():
    root = Path(__file__).parents[3]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(root / "triton_kernels")
    done = subprocess.run([sys.executable, "-c", BUILD], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(built) == 5
    for shared, products, _ in built:
        assert 0 < shared <= 163 * 1024
        assert products > 0  # of int8 tensor cores
    # Programs of a stack that have no rows end early, and wait too.
    assert [waits for *_, waits in built] == [2, 2, 1, 1, 0]
