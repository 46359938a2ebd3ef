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
TABLES = {"rest_ptr": "*bf16", "dense_ptr": "*bf16", "total_ptr": "*i32"}
for capability, place, way, block_m in (
    (90, "groups", "tiles", 16), (90, "groups", "gather", 128), (90, "ids", "planes", 16), (90, "one", "tiles", 16),
    (90, "one", "tiles", 64), (80, "one", "codes", 16), (80, "one", "tiles", 16),
):
    pointers = dict.fromkeys(("codes_ptr", "weight_ptr"), "*i8") | dict.fromkeys(("scale_ptr", "absmax_ptr"), "*fp32")
    pointers |= dict.fromkeys(("x_ptr", "out_ptr", "bias_ptr"), "*bf16") | PLACES[place]
    pointers |= ({"mark_ptr": "*i32"} if way in ("tiles", "gather") else {}) | (TABLES if way == "gather" else {})
    numbers = dict.fromkeys(("M", "N", "K", "E", "repeat", "words", "split", "k_per_split"), "i32")
    numbers |= {"threshold": "fp32"}
    constants = dict(
        MARKS=128, WORDS=32, CAPACITY=128, FEW={"tiles": 16, "gather": 4}.get(way, 0), PLANES=way == "planes",
        EVEN_K=True, PDL=capability >= 90, PREFETCHES=2 if capability >= 90 else 0, BLOCK_M=block_m, BLOCK_N=64,
        BLOCK_K=128, BLOCK_OUTLIERS=16, GROUP_M=8,
    )
    constants |= {name: None for name in kernel.arg_names if name.endswith("_ptr") and name not in pointers}
    assert {*pointers, *numbers, *constants} == {*kernel.arg_names}
    types = pointers | numbers | dict.fromkeys(constants, "constexpr")
    index = kernel.arg_names.index
    aligned = {(index(name),): [["tt.divisibility", 16]] for name in (*pointers, "N", "K")}
    signature = {name: types[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(index(name),): value for name, value in constants.items()}, aligned)
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False, "launch_pdl": capability >= 90}
    built = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = built.asm["ptx"]
    print(built.metadata.shared, ptx.count("s32.s8.s8"), ptx.count("griddepcontrol.wait"))
"""

BUILD_TOKENS = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from bigq_kernels.int8.tokens import _quantize_tokens_kernel as kernel

for capability, pairs in ((90, True), (90, False), (80, True)):
    types = {"x_ptr": "*bf16", "codes_ptr": "*i8", "scale_ptr": "*fp32", "mark_ptr": "*i32", "threshold": "fp32"}
    types |= dict.fromkeys(("M", "K", "words", "tiles"), "i32")
    constants = dict(arrived_ptr=None, FINDS=True, PAIRS=pairs, BLOCK_M=256, TILES=1, BLOCK_K=4096)
    constants["PDL"] = capability >= 90
    types |= dict.fromkeys(constants, "constexpr")
    index = kernel.arg_names.index
    aligned = {(index(name),): [["tt.divisibility", 16]] for name in ("x_ptr", "codes_ptr", "mark_ptr", "K")}
    signature = {name: types[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(index(name),): value for name, value in constants.items()}, aligned)
    options = {"num_warps": 8, "enable_fp_fusion": False, "launch_pdl": capability >= 90}
    ptx = compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
    print(ptx.count("ld.global.v4.b32"), ptx.count("redux.sync.or"))
"""


def _lines(program: str) -> list[tuple[int, ...]]:
    """The numbers that it prints."""
    root = Path(__file__).parents[3]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(root / "triton_kernels")
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_tokens_are_read_16_bytes_at_a_time():
    """A row takes two loads, and four times 64 rows of 32 columns take four."""
    for loads, reductions in _lines(BUILD_TOKENS):
        assert loads == 6
        assert reductions in (1, 2)  # Triton 3.9 has one more


@pytest.mark.slow
def test_every_place_of_a_program_compiles():
    built = _lines(BUILD)
    assert len(built) == 7
    for shared, products, _ in built:
        assert 0 < shared <= 163 * 1024
        assert products > 0  # of int8 tensor cores
    # Programs of a stack that have no rows end early, and wait too.
    assert [waits for *_, waits in built] == [2, 2, 1, 1, 1, 0, 0]
