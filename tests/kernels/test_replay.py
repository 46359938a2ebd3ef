"""A replay gives what the launcher gives, on other inputs of the same looks; what it cannot repeat it refuses to keep.

The kernels here are Python on raw addresses, so that all runs without a GPU; tests/ops/test_eager.py runs real ones.
"""

import ctypes
import math
from importlib import import_module
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bigq_kernels import internals, replay
from bigq_kernels.block4.linear import linear_4bit
from bigq_kernels.int8.linear import linear_int8
from bigq_kernels.launch import dense_linear, launch, observed
from bigq_kernels.replay import record

K, N = 64, 6
KERNELS = Path(replay.__file__).parent
MODULES = [path.relative_to(KERNELS).with_suffix("") for path in KERNELS.rglob("[!_]*.py") if path.stem != "launch"]
TABLE = torch.tensor([0.5])
pytestmark = pytest.mark.skipif(
    not internals.IS_COMPLETE, reason="replays are off: parts of Triton or torch that they use are not there"
)


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """Not here: filling what a launcher allocates is work of torch's that no replay can repeat."""


def at(address, *shape):
    """The float32 array at an address, which is not torch's; a wrong source of a pointer shows as wrong values."""
    buffer = (ctypes.c_float * math.prod(shape)).from_address(address)
    return np.frombuffer(buffer, dtype=np.float32).reshape(shape)


class Kernel:
    """Stands for a JIT function and its compiled kernel: `function` takes addresses and numbers."""

    function, packed_metadata = 7, ("metadata",)

    def __init__(self, body, arg_names):
        self.body, self.arg_names, self.runs = body, arg_names, 0

    def __getitem__(self, grid):
        def start(*args, **constants):
            internals.knobs.runtime.launch_enter_hook(None)
            constants = {name: constants[name] for name in self.arg_names[len(args) :] if name in constants}
            values = (*args, *constants.values())
            self.body(*(value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values))
            return self

        return start

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        assert (x, y, z, stream, function, metadata) == (3, 1, 1, 11, 7, ("metadata",))
        assert launch_metadata is enter is leave is None
        self.runs += 1
        self.body(*args)


def _double(x, doubled, m):
    at(doubled, m, K)[:] = 2 * at(x, m, K)


def _multiply(doubled, weight, bias, table, out, m, SCALE):
    with np.errstate(invalid="ignore", over="ignore"):  # it may run on memory that nobody wrote
        total = at(doubled, m, K) @ at(weight, N, K).T * at(table, 1) * np.float32(SCALE)
    at(out, m, N)[:] = total if bias in (None, 0) else total + at(bias, N)


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # as get_device() of a CPU tensor
    monkeypatch.setattr(
        internals, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device_index: 11))
    )
    double = Kernel(_double, ["x", "doubled", "m"])
    multiply = Kernel(_multiply, ["doubled", "weight", "bias", "table", "out", "m", "SCALE"])
    return double, multiply


def launcher_of(kernels, unusual=None):
    double, multiply = kernels

    def launcher(x, weight, bias, scale):
        rows = x.reshape(-1, K)
        m = rows.shape[0]
        doubled = torch.empty(m, K + 1, device=x.device)  # not a multiple of the alignment
        out = x.new_empty(*x.shape[:-1], N)
        if unusual is not None:
            weight, out = unusual(weight, out)
        launch(double, (3,), rows, doubled, m, options={})
        launch(multiply, (3,), doubled, weight, bias, TABLE, out, m, SCALE=scale, options={})
        return out

    return launcher


def inputs(m=2):
    return torch.randn(1, m, K), torch.randn(N, K), torch.randn(N)


def addresses(*tensors):
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_repeats_the_launches_on_other_tensors(kernels, with_bias):
    launcher = launcher_of(kernels)
    x, weight, bias = inputs()
    bias = bias if with_bias else None
    out, kept = record(launcher, (x, weight, bias), (3.0,))
    assert torch.equal(out, launcher(x, weight, bias, 3.0))
    for _ in range(2):
        x, weight, other = inputs()
        bias = other if with_bias else None
        bound = kept.bind(addresses(weight, bias))
        first = bound(x, (weight, bias))
        assert first.shape == (1, 2, N)
        assert torch.equal(first, launcher(x, weight, bias, 3.0))
        weight.mul_(2)  # what is bound is the memory, not the values
        assert torch.equal(bound(x, (weight, bias)), launcher(x, weight, bias, 3.0))
        assert torch.equal(first, launcher(x, weight / 2, bias, 3.0))
    assert [kernel.runs for kernel in kernels] == [4, 4]


def test_workspaces_do_not_overlap(kernels):
    double, _ = kernels

    def launcher(x):
        one, two, out = torch.empty(K + 1), torch.empty(K + 1), x.new_empty(1, K)
        launch(double, (3,), x, one, 1, options={})
        launch(double, (3,), one, two, 1, options={})
        launch(double, (3,), one, out, 1, options={})
        return out

    x = torch.randn(1, K)
    _, kept = record(launcher, (x,), ())
    assert kept.workspace_numel * 4 == 2 * 512  # 65 floats each, rounded up to 256 bytes
    assert torch.equal(kept.bind([])(x, ()), 4 * x)


@pytest.mark.parametrize(
    "unusual",
    [
        pytest.param(lambda weight, out: (weight.clone(), out), id="copies-an-input"),
        pytest.param(lambda weight, out: (weight, out.zero_()), id="writes-with-torch"),
        pytest.param(lambda weight, out: (weight, torch.empty(N * 2 + 4)[4:].view(1, 2, N)), id="view-inside"),
        pytest.param(lambda weight, out: (weight, torch.empty(1, 2, N, dtype=torch.float64)), id="other-dtype"),
        pytest.param(lambda weight, out: (torch.empty(2 * N, K)[:N], weight), id="returns-an-input"),
    ],
)
def test_keeps_nothing_it_could_not_repeat(kernels, unusual):
    launcher = launcher_of(kernels, unusual)
    _, kept = record(launcher, inputs(), (3.0,))
    assert kept is None


def test_keeps_nothing_where_two_inputs_share_an_address(kernels):
    x, weight, _ = inputs()
    _, kept = record(launcher_of(kernels), (x, weight, weight[0]), (3.0,))
    assert kept is None


def test_keeps_nothing_where_a_kernel_started_unseen(kernels):
    double, _ = kernels

    def launcher(x):
        out, unseen = x.new_empty(1, 2, K), x.new_empty(1, 2, K)
        double[(3,)](x, unseen, 2)
        launch(double, (3,), unseen, out, 2, options={})
        return out

    x, _, _ = inputs()
    out, kept = record(launcher, (x,), ())
    assert torch.equal(out, 4 * x)
    assert kept is None


def test_keeps_nothing_of_torch_alone():
    x, weight, _ = inputs()
    out, kept = record(torch.nn.functional.linear, (x, weight), ())
    assert torch.equal(out, x @ weight.T)
    assert kept is None


def test_steps_aside_when_x_or_the_moment_differs(kernels, monkeypatch):
    x, weight, bias = inputs()
    _, kept = record(launcher_of(kernels), (x, weight, bias), (3.0,))
    bound = kept.bind(addresses(weight, bias))
    assert bound(x, (weight, bias)) is not None
    assert bound(torch.randn(1, K, 2).transpose(1, 2), (weight, bias)) is None  # strides
    assert bound(torch.randn(1 + 2 * K)[1:].view(1, 2, K), (weight, bias)) is None  # alignment
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: 1)
        assert bound(x, (weight, bias)) is None
    hooks = internals.knobs.runtime.launch_exit_hook
    hooks.add(print)
    try:
        assert bound(x, (weight, bias)) is None
    finally:
        hooks.remove(print)
    assert bound(x, (weight, bias)) is not None


def _dense_launcher(kernels, multiply=dense_linear):
    """Unpacks a weight by a kernel, here to 2 * weight, and leaves the product to torch."""
    double, _ = kernels

    def launcher(x, weight, bias):
        dense = torch.empty(N, K)
        launch(double, (3,), weight, dense, N, options={})
        return multiply(x, dense, bias)

    return launcher


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_ends_with_a_product_of_torchs(kernels, with_bias):
    launcher = _dense_launcher(kernels)
    x, weight, bias = inputs(m=5)
    bias = bias if with_bias else None
    out, kept = record(launcher, (x, weight, bias), ())
    assert torch.equal(out, launcher(x, weight, bias))
    x, weight, other = inputs(m=5)
    bias = other if with_bias else None
    again = kept.bind(addresses(weight, bias))(x, (weight, bias))
    assert again.shape == (1, 5, N)
    assert torch.equal(again, launcher(x, weight, bias))


def test_ends_with_a_product_by_the_transposed_weight(kernels):
    launcher = _dense_launcher(kernels, lambda grad, dense, bias: dense_linear(grad, dense.mT, bias))
    (_, weight, _), grad = inputs(), torch.randn(1, 5, N)
    out, kept = record(launcher, (grad, weight, None), ())
    torch.testing.assert_close(out, grad @ (2 * weight))
    other, grad = torch.randn(N, K), torch.randn(1, 5, N)
    again = kept.bind(addresses(other, None))(grad, (other, None))
    assert torch.equal(again, launcher(grad, other, None))


def test_other_live_inputs_are_those_of_each_call(kernels):
    launcher = launcher_of(kernels)

    def with_weight_in_front(x, weight, bias, factor):
        return launcher(x, weight, bias, factor)

    x, weight, bias = inputs()
    _, kept = record(with_weight_in_front, (x, weight, bias), (3.0,), live=2)
    bound = kept.bind(addresses(bias))
    for _ in range(2):
        x, weight, _ = inputs()
        assert torch.equal(bound(x, (bias,), (weight,)), launcher(x, weight, bias, 3.0))
    unaligned = torch.randn(1 + N * K)[1:].view(N, K)
    assert bound(x, (bias,), (unaligned,)) is None


@pytest.mark.parametrize(
    "multiply",
    [
        pytest.param(lambda x, dense, bias: dense_linear(x, dense, bias).neg_(), id="not-the-last-step"),
        pytest.param(lambda x, dense, bias: dense_linear(x * 2, dense, bias), id="not-of-x"),
        pytest.param(lambda x, dense, bias: dense_linear(x, dense, bias.clone()), id="another-bias"),
        pytest.param(lambda x, dense, bias: dense_linear(x, torch.empty(N, K), bias), id="another-weight"),
        pytest.param(torch.nn.functional.linear, id="unseen"),
    ],
)
def test_keeps_no_other_product(kernels, multiply):
    _, kept = record(_dense_launcher(kernels, multiply), inputs(), ())
    assert kept is None


def test_finds_an_input_that_is_read_as_another_dtype(kernels):
    """Scales are bits in int32, which a launcher views as float32."""
    launcher = launcher_of(kernels, lambda weight, out: (weight.view(torch.float32), out))
    x, weight, bias = inputs()
    out, kept = record(launcher, (x, weight.view(torch.int32), bias), (3.0,))
    assert torch.equal(out, launcher_of(kernels)(x, weight, bias, 3.0))
    other = torch.randn(N, K)
    again = kept.bind(addresses(other, bias))(x, (other, bias))
    assert torch.equal(again, launcher_of(kernels)(x, other, bias, 3.0))


@pytest.mark.parametrize("fmt", ["nf4", "nf4-double-quant", "int8", "int8-no-outliers"])
def test_linears_do_nothing_that_a_replay_could_not(monkeypatch, fmt):
    """With kernels that do nothing: what is between them only allocates and takes views."""
    launched = []
    for name in MODULES:
        module = import_module(".".join(("bigq_kernels", *name.parts)))
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", lambda kernel, *args, **kwargs: launched.append(kernel))
    for scales, dtype in product((torch.float32, torch.int32), (torch.bfloat16, torch.float32)):
        for m in (1, 2, 3, 16, 17, 64, 129, 300):
            launcher, tensors, settings = _linear(fmt, dtype, scales)
            x = torch.ones(m, 128, dtype=dtype)
            launcher(x, *tensors, *settings)  # makes its tables
            launched.clear()
            with replay._Watch() as watch, observed(lambda *launch: None):
                launcher(x, *tensors, *settings)
            assert watch.pure, (scales, dtype, m)
            assert launched, (scales, dtype, m)


def _linear(fmt, dtype, scales):
    """A launcher, the tensors of a weight [96, 128] and the settings."""
    n, k = 96, 128
    if fmt.startswith("int8"):
        launcher, settings = linear_int8, (0.0 if fmt.endswith("outliers") else 6.0,)
        tensors = (torch.ones(n, k, dtype=torch.int8), torch.ones(n, 1, dtype=scales), torch.ones(n, dtype=dtype))
    else:
        launcher, settings = linear_4bit, ("nf4", 64, k)
        nested = fmt.endswith("quant")
        absmax = torch.ones(n, k // 64, dtype=torch.uint8 if nested else scales)
        tensors = (torch.zeros(n, k // 2, dtype=torch.uint8), absmax, torch.ones(n, dtype=dtype))
        tensors += (torch.ones(1, dtype=scales), torch.ones(1, dtype=scales)) if nested else (None, None)
    return launcher, tensors, settings
