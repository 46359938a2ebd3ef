"""The ops: registered where we say, right under fake tensors and compilation, right gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

from bigq import ops, reference

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = sorted(ops._SCHEMAS)


def sample(name, dtype=torch.float32):
    weight = torch.randn(6, 70, dtype=dtype, device=DEVICE)
    packed, absmax = ops.quantize_4bit(weight, "nf4", 32)
    codes, nested, offset = ops.quantize_absmax(absmax)
    int8, scale = ops.quantize_int8(weight)
    x = torch.randn(3, 70, dtype=dtype, device=DEVICE)
    bias = torch.randn(6, device=DEVICE)
    return {
        "quantize_4bit": (weight, "nf4", 32),
        "dequantize_4bit": (packed, absmax, "nf4", 32, 70, torch.float16),
        "quantize_absmax": (absmax,),
        "dequantize_absmax": (codes, nested, offset),
        "linear_4bit": (x, packed, codes, bias, nested, offset, "nf4", 32),
        "quantize_int8": (weight,),
        "dequantize_int8": (int8, scale, torch.float16),
        "linear_int8": (x, int8, scale, bias, 2.0),
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_op_has_both_devices(name):
    for key in ("CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bigq::{name}", key) or key == "Meta"
    assert callable(getattr(reference, name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")  # opcheck's own
def test_opcheck(name):
    opcheck(getattr(torch.ops.bigq, name).default, sample(name))


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_not_changed(name):
    arguments = sample(name)
    before = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
    getattr(ops, name)(*arguments)
    for value, copy in zip(arguments, before, strict=True):
        assert torch.equal(value, copy) if isinstance(value, torch.Tensor) else value == copy


@pytest.mark.parametrize("name", ["linear_4bit", "linear_int8"])
def test_gradients_are_those_of_the_dequantized_weight(name):
    arguments = list(sample(name))
    x, bias = arguments[0].requires_grad_(), arguments[3].requires_grad_()
    getattr(ops, name)(*arguments).square().sum().backward()
    with torch.no_grad():
        out = getattr(ops, name)(*arguments)
        if name == "linear_4bit":
            absmax = ops.dequantize_absmax(arguments[2], arguments[4], arguments[5])
            dense = ops.dequantize_4bit(arguments[1], absmax, "nf4", 32, 70, torch.float32)
        else:
            dense = ops.dequantize_int8(arguments[1], arguments[2], torch.float32)
    torch.testing.assert_close(x.grad, 2 * out @ dense)
    torch.testing.assert_close(bias.grad, 2 * out.sum(dim=0))


def test_gradient_in_higher_rank_and_half_precision():
    x, packed, codes, bias, nested, offset, *rest = sample("linear_4bit")
    x = x[None].bfloat16().requires_grad_()
    bias = bias.requires_grad_()
    ops.linear_4bit(x, packed, codes, bias, nested, offset, *rest).sum().backward()
    assert (x.grad.shape, x.grad.dtype) == (x.shape, torch.bfloat16)
    assert bias.grad.tolist() == [3.0] * 6


@pytest.mark.parametrize("name", ["linear_4bit", "linear_int8"])
def test_a_wrong_depth_is_refused_under_compilation(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        arguments = [mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in sample(name)]
        arguments[0] = arguments[0][:, :40]
        with pytest.raises(RuntimeError, match="differ in in_features"):
            getattr(ops, name)(*arguments)


def test_tables_are_real_inside_a_meta_context():
    reference._tables.cache_clear()
    reference.nested_code.cache_clear()
    with torch.device("meta"):
        packed, _ = ops.quantize_4bit(torch.randn(1, 64, device="cpu"), "fp4", 64)
        reference.nested_code(torch.device("cpu"))
    assert packed.device.type == reference.nested_code(torch.device("cpu")).device.type == "cpu"


@pytest.mark.gpu
def test_the_one_switch_runs_the_reference_on_cuda():
    code = (
        "import sys, torch; from bigq import ops;"
        "w = torch.randn(4, 64, device='cuda'); p, a = ops.quantize_4bit(w, 'nf4', 64);"
        "assert p.is_cuda and 'bigq_kernels' not in sys.modules"
    )
    path = f"{ROOT}:{ROOT / 'triton_kernels'}:{os.environ.get('PYTHONPATH', '')}"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "BIGQ_REFERENCE": "1", "PYTHONPATH": path}
    )
