"""The ops: registered where we say, right under fake tensors and compilation, right gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

from bigq import ops
from bigq.ops import code_tables, library, reference

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = sorted(library._SCHEMAS)


def sample(name, dtype=torch.float32):
    weight = torch.randn(6, 70, dtype=dtype, device=DEVICE)
    packed, absmax = ops.quantize_4bit(weight, "nf4", 32)
    codes, nested, offset = ops.quantize_absmax(absmax)
    int8, scale = ops.quantize_int8(weight)
    x = torch.randn(3, 70, dtype=dtype, device=DEVICE)
    bias = torch.randn(6, device=DEVICE)
    stack = (packed.view(3, 2, 35), codes.view(3, 2, 3), bias.view(3, 2), nested, offset, "nf4", 32, 70)
    int8_stack = (int8.view(3, 2, 70), scale.view(3, 2, 1), bias.view(3, 2), 2.0)
    stops = torch.tensor([1, 1, 2], dtype=torch.int32, device=DEVICE)
    ids = torch.tensor([2, 0, 1, 1, 3, 2], device=DEVICE)
    stamps = torch.arange(6, device=DEVICE)
    return {
        "quantize_4bit": (weight, "nf4", 32),
        "search_scales_4bit": (weight, torch.rand(70, device=DEVICE), "nf4", 32),
        "encode_scaled_4bit": (weight, -absmax, "nf4", 32),
        "dequantize_4bit": (packed, absmax, "nf4", 32, 70, torch.float16),
        "quantize_absmax": (absmax,),
        "dequantize_absmax": (codes, nested, offset),
        "linear_4bit": (x, packed, codes, bias, nested, offset, "nf4", 32),
        "grouped_linear_4bit": (x, stops, *stack),
        "routed_linear_4bit": (x, ids, *stack),
        "grouped_linear_4bit_backward": (torch.randn(3, 2, dtype=dtype, device=DEVICE), stops, *stack[:2], *stack[3:]),
        "grouped_matmul": (x, stops, torch.randn(3, 70, 4, dtype=dtype, device=DEVICE)),
        "sort_rows": (ids, 3),
        "assign_slots": (ids, torch.full((6,), -1, dtype=torch.int32, device=DEVICE), stamps, 3),
        "fill_slots": (torch.tensor([[1, 0], [2, 4], [-1, -1]], device=DEVICE).int(), [codes], [codes.clone()]),
        "take_rows": (x, torch.tensor([1, 0, 2, 5, 3, 4], device=DEVICE), None, 6, dtype),
        "sum_rows": (weight, torch.tensor([1, 0, 2, 5, 3, 4], device=DEVICE).int(), bias.view(3, 2), 3, dtype),
        "dot_rows": (weight, None, x, dtype),
        "gated": (x, "silu", 0.0, 0.0),
        "gated_backward": (x[:, :35], x, "clamped", 1.7, 1.0),
        "quantize_int8": (weight,),
        "dequantize_int8": (int8, scale, torch.float16),
        "linear_int8": (x, int8, scale, bias, 2.0),
        "grouped_linear_int8": (x, stops, *int8_stack),
        "grouped_linear_int8_backward": (
            torch.randn(3, 2, dtype=dtype, device=DEVICE),
            stops,
            *int8_stack[:2],
        ),
        "routed_linear_int8": (x, ids, *int8_stack),
        "routed_linear_4bit-part": (x, ids, *stack, 7),
        "linear_4bit-whole": (x, packed, absmax, bias, None, None, "nf4", 32, 70),
        "linear_4bit-fp4": (x, *ops.quantize_4bit(weight, "fp4", 64), None, None, None, "fp4", 64, None),
    }[name]


SCALES = {  # of each op that takes scales, where
    "dequantize_4bit": (1,),
    "quantize_absmax": (0,),
    "dequantize_absmax": (1, 2),
    "linear_4bit": (4, 5),
    "linear_4bit-whole": (2,),
    "linear_4bit-fp4": (2,),
    "grouped_linear_4bit": (5, 6),
    "routed_linear_4bit": (5, 6),
    "routed_linear_4bit-part": (5, 6),
    "grouped_linear_4bit_backward": (4, 5),
    "dequantize_int8": (1,),
    "linear_int8": (2,),
    "grouped_linear_int8": (3,),
    "grouped_linear_int8_backward": (3,),
    "routed_linear_int8": (3,),
}


def with_bits(name, arguments):
    """The same arguments with the bits of the scales in their place."""
    return tuple(v.view(torch.int32) if i in SCALES[name] else v for i, v in enumerate(arguments))


def assert_same(actual, expected):
    pairs = zip(actual, expected, strict=True) if isinstance(expected, (tuple, list)) else [(actual, expected)]
    for a, e in pairs:
        assert a.dtype == e.dtype
        assert torch.equal(a, e)


@pytest.mark.parametrize("name", NAMES)
def test_every_op_has_both_devices(name):
    for key in ("CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bigq::{name}", key) or key == "Meta"
    assert callable(getattr(reference, name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")  # opcheck's own
def test_opcheck(name):
    opcheck(getattr(torch.ops.bigq, name).default, sample(name))


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.filterwarnings("ignore")  # opcheck's own
def test_opcheck_of_the_bits_of_scales(name):
    arguments = with_bits(name, sample(name))
    if name.startswith("linear"):
        arguments[0].requires_grad_()
    opcheck(getattr(torch.ops.bigq, name.split("-")[0]).default, arguments)


@pytest.mark.parametrize("name", SCALES)
def test_the_bits_of_scales_give_the_same_as_their_floats(name):
    op, arguments = getattr(ops, name.split("-")[0]), sample(name)
    assert_same(op(*with_bits(name, arguments)), op(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in SCALES if name.startswith("linear")])
def test_gradients_from_the_bits_of_scales_are_those_from_their_floats(name, dtype):
    op, gradients = getattr(ops, name.split("-")[0]), []
    original = sample(name, dtype)
    for arguments in (original, with_bits(name, original)):
        x = arguments[0].detach().clone().requires_grad_()
        out = op(x, *arguments[1:])
        (out * torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)).sum().backward()
        gradients.append(x.grad)
    assert gradients[0].abs().sum() > 0
    assert_same(gradients[1], gradients[0])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", [name for name in SCALES if name.startswith("linear")])
def test_compiled_code_takes_the_bits_of_scales(name, dynamic):
    op, arguments = getattr(ops, name.split("-")[0]), sample(name)
    bits = with_bits(name, arguments)[1:]
    torch._dynamo.reset()  # else what earlier cases compiled counts

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=dynamic)
    def compiled(x):
        return op(x * 2, *bits)

    for tokens in (2, 5, 7):
        x = torch.randn(tokens, 70, device=DEVICE, requires_grad=True)
        out = compiled(x)
        expected = op(x * 2, *arguments[1:])
        assert_same(out, expected)
        assert_same(torch.autograd.grad(out.sum(), x), torch.autograd.grad(expected.sum(), x))


@pytest.mark.parametrize("name", SCALES)
def test_fakes_of_the_bits_of_scales_look_like_the_result(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    op, arguments = getattr(ops, name.split("-")[0]), with_bits(name, sample(name))
    result = op(*arguments)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in arguments))
    pairs = zip(fake, result, strict=True) if isinstance(result, (tuple, list)) else [(fake, result)]
    for a, e in pairs:
        assert (a.shape, a.dtype, a.device) == (e.shape, e.dtype, e.device)


def test_in_features_may_be_left_out_and_is_held_to():
    arguments = sample("linear_4bit")
    assert torch.equal(ops.linear_4bit(*arguments, 70), ops.linear_4bit(*arguments))
    assert torch.equal(ops.linear_4bit(*arguments, in_features=70), ops.linear_4bit(*arguments))
    with pytest.raises(RuntimeError, match=r"x is \[3, 70\]; expected \[\.\.\., 69\]"):
        ops.linear_4bit(*arguments, 69)


@pytest.mark.parametrize("name", [name for name in NAMES if "!" not in library._SCHEMAS[name]])
def test_inputs_are_not_changed(name):
    arguments = sample(name)
    before = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
    getattr(torch.ops.bigq, name).default(*arguments)
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


@pytest.mark.parametrize("bits", ["4bit", "int8"])
@pytest.mark.parametrize("kind", ["grouped", "routed"])
def test_gradients_of_a_stack_are_those_of_its_dequantized_weights(kind, bits):
    arguments = list(sample(f"{kind}_linear_{bits}"))
    x, route, bias = arguments[0].requires_grad_(), arguments[1], arguments[4].requires_grad_()
    out = getattr(ops, f"{kind}_linear_{bits}")(*arguments)
    slopes = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)
    (out * slopes).sum().backward()
    if bits == "4bit":
        absmax = ops.dequantize_absmax(*(arguments[i] for i in (3, 5, 6)))
        dense = ops.dequantize_4bit(arguments[2].flatten(0, 1), absmax.flatten(0, 1), "nf4", 32, 70, torch.float32)
    else:
        dense = ops.dequantize_int8(arguments[2].flatten(0, 1), arguments[3].flatten(0, 1), torch.float32)
    ids = torch.searchsorted(route, torch.arange(3, device=DEVICE, dtype=torch.int32), right=True)
    ids = ids if kind == "grouped" else route
    own_x, own_bias = (tensor.detach().clone().requires_grad_() for tensor in (x, bias))
    known = ids < 3
    rows = own_x.repeat_interleave(len(ids) // len(x), dim=0)[known]
    exact = torch.einsum("sk,snk->sn", rows, dense.view(3, 2, 70)[ids[known]]) + own_bias[ids[known]]
    (exact * slopes[known]).sum().backward()
    torch.testing.assert_close(x.grad, own_x.grad)
    torch.testing.assert_close(bias.grad, own_bias.grad)


@pytest.mark.parametrize("e, n", [(0, 4), (3, 0)], ids=["no-weights", "no-outputs"])
@pytest.mark.parametrize("bits", ["4bit", "int8"])
@pytest.mark.parametrize("kind", ["grouped", "routed"])
def test_gradients_of_an_empty_stack_are_zeros(kind, bits, e, n):
    x = torch.randn(2, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(e, n, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    routes = torch.full((e,), 2, device=DEVICE), torch.zeros(4, device=DEVICE)
    codes = torch.zeros(e, n, 32 if bits == "4bit" else 64, device=DEVICE)
    codes, settings = (codes.byte(), (None, None, "nf4", 64)) if bits == "4bit" else (codes.char(), (6.0,))
    route, scales = routes[kind == "routed"].int(), torch.ones(e, n, 1, device=DEVICE)
    out = getattr(ops, f"{kind}_linear_{bits}")(x, route, codes, scales, bias, *settings)
    grad_x, grad_bias = torch.autograd.grad(out.sum(), (x, bias))
    assert torch.equal(grad_x, torch.zeros_like(x))
    assert grad_bias.shape == (e, n)


@pytest.mark.parametrize("name", ["routed_linear_4bit", "routed_linear_int8"])
def test_ids_without_rows_of_x_are_refused(name):
    x, ids, *rest = sample(name)
    for given in (x[:0], x[:2]):
        with pytest.raises(RuntimeError, match="expected a multiple of the rows of x"):
            getattr(ops, name)(given, ids[:5], *rest)
    assert getattr(ops, name)(x[:0], ids[:0], *rest).shape == (0, 2)


def test_a_part_of_a_stack_has_the_gradients_of_a_stack():
    x, ids, packed, absmax, bias, *rest = sample("routed_linear_4bit")
    found = []
    for weights in ((), (7,)):
        inputs = x.clone().requires_grad_(), bias.clone().requires_grad_()
        out = ops.routed_linear_4bit(inputs[0], ids, packed, absmax, inputs[1], *rest, *weights)
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), inputs)))
    assert found[0][1].any()
    assert_same(*found)


def test_gradients_of_grouped_matmul_are_those_of_each_product():
    x, stops, dense = sample("grouped_matmul")
    gradient = torch.autograd.grad(ops.grouped_matmul(x.requires_grad_(), stops, dense).sum(), x)[0]
    expected = torch.stack([dense[0].sum(-1), dense[2].sum(-1), torch.zeros(70, device=DEVICE)])
    torch.testing.assert_close(gradient, expected)


def test_the_gradient_of_a_gradient_of_a_stack_is_its_product():
    grad, stops, *state = sample("grouped_linear_4bit_backward")
    grad_x = ops.grouped_linear_4bit_backward(grad.requires_grad_(), stops, *state)
    slopes = torch.randn_like(grad_x)
    expected = ops.grouped_linear_4bit(slopes, stops, *state[:2], None, *state[2:])
    torch.testing.assert_close(torch.autograd.grad(grad_x, grad, slopes)[0], expected)


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
    code_tables.tables_of.cache_clear()
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


@pytest.mark.parametrize("name", ["linear_4bit", "linear_4bit-whole", "linear_int8"])
def test_what_a_linear_returns_can_be_changed_in_place(name):
    x, *others = sample(name)
    x = x.reshape(1, 3, -1).requires_grad_()
    y = getattr(ops, name.split("-")[0])(x, *others)
    assert y._base is None
    y += 1
    torch.relu_(y)
    y.sum().backward()
    assert x.grad.shape == x.shape
