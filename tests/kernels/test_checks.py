"""What does not fit together is refused by launchers, the reference and fakes alike, with what was got and expected."""

import sys
from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bigq import ops
from bigq.errors import UnsupportedError
from bigq.ops import checks, library, reference
from bigq_kernels.checks import as_floats

N, K, BLOCK_SIZE = 6, 70, 32  # 3 blocks a row, 18 scales
ARGUMENTS = {
    "linear_4bit": (
        "x",
        "weight",
        "absmax",
        "bias",
        "nested_absmax",
        "nested_offset",
        "quant_type",
        "block_size",
        "in_features",
    ),
    "linear_int8": ("x", "weight", "absmax", "bias", "threshold"),
    "grouped_linear_int8": ("x", "stops", "weights", "scales", "biases", "threshold"),
    "routed_linear_int8": ("x", "ids", "weights", "scales", "biases", "threshold"),
    "dequantize_4bit": ("weight", "absmax", "quant_type", "block_size", "in_features", "dtype"),
    "dequantize_int8": ("weight", "absmax", "dtype"),
    "dequantize_absmax": ("absmax", "nested_absmax", "nested_offset"),
    "quantize_absmax": ("absmax",),
    "search_scales_4bit": ("float_weight", "importance", "quant_type", "block_size"),
    "encode_scaled_4bit": ("float_weight", "absmax", "quant_type", "block_size"),
}


def arguments_of(name, device, nested=False):
    """The arguments of an op by name, which fit together."""
    weight, k = torch.randn(N, K, device=device), K
    if name.endswith("int8"):
        packed, absmax = reference.quantize_int8(weight)
    else:
        packed, absmax = reference.quantize_4bit(weight, "nf4", BLOCK_SIZE)
    given = {
        "x": torch.randn(2, K, device=device).half(),
        "weight": packed,
        "absmax": absmax,
        "bias": torch.randn(N, device=device),
        "nested_absmax": None,
        "nested_offset": None,
        "quant_type": "nf4",
        "block_size": BLOCK_SIZE,
        "in_features": k,
        "threshold": 6.0,
        "dtype": torch.float16,
        "float_weight": weight,
        "importance": torch.rand(K, device=device),
        "stops": torch.tensor([1, 1, 2], dtype=torch.int32, device=device),
        "ids": torch.tensor([2, 0, 1, 1], device=device),
        "weights": packed.view(3, 2, -1),
        "scales": absmax.view(3, 2, -1),
        "biases": torch.randn(3, 2, device=device),
    }
    if nested:
        given["absmax"], given["nested_absmax"], given["nested_offset"] = reference.quantize_absmax(absmax)
    return {argument: given[argument] for argument in ARGUMENTS[name]}


def launcher(name):
    return getattr(import_module(library._LAUNCHERS[name]), name)


def fake(name):
    def call(*args):
        with FakeTensorMode() as mode:
            args = [mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
            return getattr(ops, name)(*args)

    return call


IMPLEMENTATIONS = {
    "launcher": launcher,
    "reference": lambda name: getattr(reference, name),
    "op": lambda name: getattr(ops, name),
    "fake": fake,
}


@pytest.fixture(params=IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
def implementation(request):
    """A function that gives the implementation of an op by its name."""
    return request.param


def resized(*shape):
    return lambda tensor: torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)


def cast(dtype):
    return lambda tensor: tensor.to(dtype)


def left_out(_):
    return None


FOUR_BIT = r"expected torch\.float32 or torch\.int32 \[6, 3\]"
NESTED = r"expected torch\.uint8 \[6, 3\]"
CASES = [  # op, whether scales are nested, the argument that does not fit, how it came about, the message
    ("linear_4bit", False, "x", resized(2, 64), r"x is \[2, 64\]; expected \[\.\.\., 70\]"),
    ("linear_4bit", False, "x", resized(2, 69), r"x is \[2, 69\]; expected \[\.\.\., 70\]"),  # as many bytes
    ("linear_4bit", False, "x", resized(128), r"x is \[128\]; expected \[\.\.\., 70\]"),
    ("linear_4bit", False, "weight", resized(N, 34), r"differ in in_features.*\[2, 70\].*\[6, 34\].*\[N, 35\]"),
    ("linear_4bit", False, "weight", cast(torch.int8), r"weight is torch\.int8 .*expected torch\.uint8 \[6, 35\]"),
    ("linear_4bit", False, "weight", resized(2, N, 35), r"weight is torch\.uint8 \[2, 6, 35\].*expected .* \[2, 35\]"),
    ("linear_4bit", False, "absmax", cast(torch.bfloat16), r"absmax is torch\.bfloat16 .*" + FOUR_BIT),
    ("linear_4bit", False, "absmax", cast(torch.int64), r"absmax is torch\.int64 .*" + FOUR_BIT),
    ("linear_4bit", False, "absmax", cast(torch.uint8), r"absmax is torch\.uint8 .*" + FOUR_BIT),
    ("linear_4bit", False, "absmax", resized(N, 2), r"absmax is torch\.float32 \[6, 2\].*" + FOUR_BIT),
    ("linear_4bit", False, "absmax", resized(N * 3), r"absmax is torch\.float32 \[18\].*" + FOUR_BIT),
    ("linear_4bit", False, "absmax", resized(N + 1, 3), r"absmax is torch\.float32 \[7, 3\].*" + FOUR_BIT),
    ("linear_4bit", False, "bias", resized(N + 1), r"bias is torch\.float32 \[7\].*expected .* \[6\]"),
    ("linear_4bit", False, "bias", resized(1), r"bias is torch\.float32 \[1\].*expected .* \[6\]"),
    ("linear_4bit", True, "absmax", cast(torch.float32), r"absmax is torch\.float32 .*" + NESTED),
    ("linear_4bit", True, "absmax", cast(torch.int32), r"absmax is torch\.int32 .*" + NESTED),
    ("linear_4bit", True, "nested_absmax", left_out, r"one of nested_absmax and nested_offset is None"),
    ("linear_4bit", True, "nested_offset", left_out, r"one of nested_absmax and nested_offset is None"),
    ("linear_4bit", True, "nested_absmax", resized(2), r"nested_absmax is torch\.float32 \[2\].*int32 \[1\]"),
    ("linear_4bit", True, "nested_absmax", cast(torch.float16), r"nested_absmax is torch\.float16 .*int32 \[1\]"),
    ("linear_4bit", True, "nested_offset", resized(), r"nested_offset is torch\.float32 \[\].*int32 \[1\]"),
    ("linear_4bit", True, "nested_offset", cast(torch.float64), r"nested_offset is torch\.float64 .*int32 \[1\]"),
    ("linear_int8", False, "x", resized(2, 64), r"differ in in_features.*\[2, 64\].*\[6, 70\].*\[N, 64\]"),
    ("linear_int8", False, "weight", cast(torch.uint8), r"weight is torch\.uint8 .*expected torch\.int8 \[6, 70\]"),
    ("linear_int8", False, "weight", resized(1, N, K), r"weight is torch\.int8 \[1, 6, 70\].*expected .*\[1, 70\]"),
    ("linear_int8", False, "absmax", cast(torch.float16), r"absmax is torch\.float16 .*int32 \[6, 1\]"),
    ("linear_int8", False, "absmax", resized(N), r"absmax is torch\.float32 \[6\].*int32 \[6, 1\]"),
    ("linear_int8", False, "bias", resized(N, 1), r"bias is torch\.float32 \[6, 1\].*expected .* \[6\]"),
    *(
        (name, False, argument, change, message)
        for name in ("grouped_linear_int8", "routed_linear_int8")
        for argument, change, message in (
            ("x", resized(2, 64), r"differ in in_features.*\[2, 64\].*\[3, 2, 70\]"),
            ("x", resized(1, 2, K), r"x is \[1, 2, 70\].*; expected \[S, K\] and \[E, N, K\]"),
            ("weights", resized(N, K), r"the weight \[6, 70\]; expected \[S, K\] and \[E, N, K\]"),
            ("weights", cast(torch.uint8), r"weight is torch\.uint8 .*expected torch\.int8 \[3, 2, 70\]"),
            ("scales", resized(3, 2), r"absmax is torch\.float32 \[3, 2\].*int32 \[3, 2, 1\]"),
            ("scales", cast(torch.float16), r"absmax is torch\.float16 .*int32 \[3, 2, 1\]"),
            ("biases", resized(N), r"bias is torch\.float32 \[6\].*expected .* \[3, 2\]"),
        )
    ),
    ("grouped_linear_int8", False, "stops", cast(torch.int64), r"stops is torch\.int64 .*expected torch\.int32 \[3\]"),
    ("grouped_linear_int8", False, "stops", resized(2), r"stops is torch\.int32 \[2\].*expected torch\.int32 \[3\]"),
    ("routed_linear_int8", False, "ids", cast(torch.int16), r"ids is torch\.int16 .*expected torch\.int32 or .*int64"),
    ("routed_linear_int8", False, "ids", resized(3), r"ids is \[3\] and x \[2, 70\]; expected a multiple of the rows"),
    ("dequantize_4bit", False, "in_features", lambda _: 72, r"weight is torch\.uint8 \[6, 35\].*uint8 \[6, 36\]"),
    ("dequantize_4bit", False, "weight", cast(torch.int8), r"weight is torch\.int8 .*expected torch\.uint8 \[6, 35\]"),
    ("dequantize_4bit", False, "absmax", cast(torch.float16), r"absmax is torch\.float16 .*" + FOUR_BIT),
    ("dequantize_4bit", False, "absmax", cast(torch.uint8), r"absmax is torch\.uint8 .*" + FOUR_BIT),
    ("dequantize_4bit", False, "absmax", resized(N, 4), r"absmax is torch\.float32 \[6, 4\].*" + FOUR_BIT),
    ("dequantize_int8", False, "weight", cast(torch.uint8), r"weight is torch\.uint8 .*expected torch\.int8 \[6, 70\]"),
    ("dequantize_int8", False, "absmax", cast(torch.bfloat16), r"absmax is torch\.bfloat16 .*int32 \[6, 1\]"),
    ("dequantize_int8", False, "absmax", resized(N + 1, 1), r"absmax is torch\.float32 \[7, 1\].*int32 \[6, 1\]"),
    ("dequantize_absmax", True, "absmax", cast(torch.int32), r"absmax is torch\.int32 .*" + NESTED),
    ("dequantize_absmax", True, "nested_absmax", resized(2), r"nested_absmax is torch\.float32 \[2\].*int32 \[1\]"),
    ("dequantize_absmax", True, "nested_absmax", cast(torch.float16), r"nested_absmax is torch\.float16 .*int32 \[1\]"),
    ("dequantize_absmax", True, "nested_offset", resized(2), r"nested_offset is torch\.float32 \[2\].*int32 \[1\]"),
    ("search_scales_4bit", False, "importance", resized(69), r"importance is torch\.float32 \[69\].*float32 \[70\]"),
    ("search_scales_4bit", False, "importance", cast(torch.float16), r"importance is torch\.float16 .*float32 \[70\]"),
    ("encode_scaled_4bit", False, "absmax", resized(N, 2), r"scales is torch\.float32 \[6, 2\].*float32 \[6, 3\]"),
    ("encode_scaled_4bit", False, "absmax", cast(torch.int32), r"scales is torch\.int32 .*float32 \[6, 3\]"),
    ("quantize_absmax", False, "absmax", cast(torch.bfloat16), r"scales are torch\.bfloat16; expected .*torch\.int32"),
]


def _id(case):
    name, nested, argument, _, message = case
    return f"{name}{'-nested' if nested else ''}-{argument}-{message.split(';')[0].split(' .*')[0]}".replace("\\", "")


@pytest.mark.parametrize("name, nested, argument, change, message", CASES, ids=map(_id, CASES))
def test_refuses_what_does_not_fit(implementation, name, nested, argument, change, message, device):
    arguments = arguments_of(name, device, nested)
    implementation(name)(*arguments.values())
    arguments[argument] = change(arguments[argument])
    with pytest.raises(RuntimeError, match=message) as caught:
        implementation(name)(*arguments.values())
    if implementation is IMPLEMENTATIONS["reference"]:
        assert isinstance(caught.value, UnsupportedError)


LINEARS = [("linear_4bit", False), ("linear_4bit", True), ("linear_int8", False)]


@pytest.mark.parametrize("name, nested", LINEARS)
@pytest.mark.parametrize("kind", ["launcher", "reference"])
def test_refuses_tensors_of_two_devices(kind, name, nested, device):
    call, right = IMPLEMENTATIONS[kind](name), arguments_of(name, device, nested)
    for argument, value in right.items():
        if isinstance(value, torch.Tensor):
            message = (
                r"x is on" if argument in ("x", "weight") else rf"{argument} is .* on meta; expected .* on {device}"
            )
            if argument == "weight":
                message = r"absmax is .*; expected .* on meta"
            with pytest.raises(RuntimeError, match=message):
                call(*{**right, argument: value.to("meta")}.values())


@pytest.mark.parametrize("k", [32, 63, 96, 128])
def test_refuses_a_wrong_width_also_without_in_features(implementation, k, device):
    weight, absmax = reference.quantize_4bit(torch.randn(N, 64, device=device), "nf4", 64)
    rest = (weight, absmax, None, None, None, "nf4", 64)
    call = implementation("linear_4bit")
    call(torch.randn(2, 64, device=device), *rest)
    if k == 63:  # as many bytes and blocks as 64: in_features tells
        call(torch.randn(2, k, device=device), *rest)
        rest = (*rest, 64)
    with pytest.raises(RuntimeError, match="in_features"):
        call(torch.randn(2, k, device=device), *rest)


def test_scales_are_a_view_of_their_bits():
    values = torch.tensor([1.5, -0.0, float("inf")])
    for function in (as_floats, checks.as_floats):
        assert function(values) is values
        bits = values.view(torch.int32)
        assert torch.equal(function(bits), values)
        assert function(bits).data_ptr() == values.data_ptr()


@pytest.mark.parametrize("name, nested", [("linear_4bit", False), ("linear_4bit", True), ("linear_int8", False)])
def test_checks_run_no_op(name, nested, device):
    """What they cost is Python alone, and a replay's record sees nothing of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Refuses(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise AssertionError(func)

    arguments = arguments_of(name, device, nested)
    arguments.pop("quant_type", None)
    arguments.pop("threshold", None)
    with Refuses():
        getattr(sys.modules["bigq_kernels.checks"], f"check_{name}")(**arguments)
