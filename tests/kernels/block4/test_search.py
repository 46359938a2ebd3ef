"""The kernels that search scales and encode with given ones equal the specification bit for bit."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bigq.ops import reference
from bigq_kernels.block4 import search

QUANT_TYPES = ["nf4", "fp4"]
SHAPES = [  # rows, columns, block size
    pytest.param(3, 131, 32, id="odd-columns"),
    pytest.param(3, 20, 64, id="row-shorter-than-a-block"),
    pytest.param(5, 300, 128, id="partial-last-block"),
    pytest.param(1, 2050, 2048, id="large-block"),
    pytest.param(0, 64, 64, id="no-rows"),
    pytest.param(2, 0, 64, id="no-columns"),
    pytest.param(700, 4096, 64, id="many-tiles", marks=pytest.mark.gpu),
    pytest.param(257, 4099, 64, id="many-odd-tiles", marks=pytest.mark.gpu),
    pytest.param(9, 8200, 4096, id="largest-block", marks=pytest.mark.gpu),
]


def assert_same_search(weight, importance, quant_type, block_size):
    """Both steps of both implementations; returns the scales."""
    args = (quant_type, block_size)
    scales = reference.search_scales_4bit(weight, importance, *args)
    found = search.search_scales_4bit(weight, importance, *args)
    assert torch.equal(found.view(torch.int32), scales.view(torch.int32))
    packed = search.encode_scaled_4bit(weight, scales, *args)
    assert torch.equal(packed, reference.encode_scaled_4bit(weight, scales, *args))
    return scales


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("rows, columns, block_size", SHAPES)
def test_scales_and_codes(rows, columns, block_size, quant_type, device):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = torch.distributions.StudentT(4.0).sample((rows, columns)).to(device, dtype)
        importance = (10.0 ** (torch.rand(columns) * 8 - 4)).to(device)
        scales = assert_same_search(weight, importance, quant_type, block_size)
        assert quant_type == "nf4" or (scales >= 0).all()


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_zero_tiny_and_huge_blocks(quant_type, device):
    largest = torch.finfo(torch.float32).max
    sizes = torch.tensor([0.0, 1e-45, 1e-40, 2.0**-126, 1.5 * 2.0**-126, 1e-30, 1e30, largest], device=device)
    weight = (torch.rand(8, 96, device=device) * 2 - 1) * sizes[:, None]
    weight[7, ::2] = largest * 0.81
    weight[7, 1] = largest
    assert_same_search(weight, torch.rand(96, device=device) + 1e-4, quant_type, 32)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
def test_a_block_with_nan_or_inf(device):
    for bad in (math.nan, math.inf, -math.inf):
        weight = torch.randn(1, 192, device=device)
        weight[0, 70] = bad
        scales = assert_same_search(weight, torch.ones(192, device=device), "nf4", 64)
        assert scales.isinf().tolist() == [[False, True, False]]


def test_ties_and_views(device):
    weight = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 0.0, 0.0]], device=device)
    assert assert_same_search(weight, torch.ones(3, device=device), "nf4", 32).tolist() == [[1.0], [1.0]]
    weight = torch.randn(70, 9, device=device)
    assert_same_search(weight.T, torch.rand(140, device=device)[::2], "nf4", 64)
    assert_same_search(weight[::9, 1:], torch.rand(8, device=device), "nf4", 32)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_codes_under_scales_that_do_not_fit(quant_type, device):
    """As double quantization rounds them: of the other sign, far too small, zero of either sign, infinite."""
    scales = torch.tensor([1.0, -1.0, 1e-3, -1e-30, 0.0, -0.0, 1e-45, math.inf, -math.inf, 3e38], device=device)
    weight = torch.randn(10, 32, device=device)
    weight[:, :3] = torch.tensor([0.0, -0.0, 1e30], device=device)
    args = (weight, scales[:, None], quant_type, 32)
    assert torch.equal(search.encode_scaled_4bit(*args), reference.encode_scaled_4bit(*args))


@pytest.mark.slow
def test_the_search_compiles_for_a_gpu_that_is_not_here():
    """Its attempts are one loop, of instructions that round every product: nine copies take a minute to compile."""
    script = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from bigq_kernels.block4.search import _search_scales_4bit_kernel as kernel

constants = dict(QUANT_TYPE="nf4", BLOCK_SIZE=64, BLOCKS=16, ROWS=1)
types = dict(weight_ptr="*bf16", importance_ptr="*fp32", scales_ptr="*fp32", largest="fp32")
signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
options = {"num_warps": 1, "enable_fp_fusion": False}
built = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32), options=options)
ptx = built.asm["ptx"]
print(ptx.count("mul.rn.f32") + ptx.count("mul.f32"), ptx.count("fma.rn.f32"))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3] / "triton_kernels")
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    products, fused = map(int, done.stdout.split())
    assert products < 400  # 6 for each of a thread's 32 elements, and some for each block
    assert fused == 0
