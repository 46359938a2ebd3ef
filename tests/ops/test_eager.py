"""The eager call gives what the op gives, and goes past the dispatcher only where the dispatcher would do nothing."""

import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from bigq import QuantizedLinear, ops
from bigq.formats import FP4, NF4, Description, Int8
from bigq.ops import eager, library, replays
from bigq.system.internals import TELLS_LISTENERS

FORMATS = [
    NF4(),
    FP4(block_size=128, double_quant=True),
    Int8(),
    Int8(threshold=0.0),
]


def is_plain(x, state):
    return not eager.something_listens() and not (torch.is_grad_enabled() and eager._needs_gradient(x, state))


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """Not here: filling what a launcher allocates is work of torch's that no replay can repeat."""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    for name, empty in (("_CALLS", {}), ("_BOUND", {}), ("_REPLAYS", {}), ("_SEEN", set())):
        monkeypatch.setattr(replays, name, empty)


class _Counter(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Functions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_this_torch_can_tell_what_listens():
    assert eager.something_listens() is not TELLS_LISTENERS


@pytest.mark.parametrize(
    "listener",
    [
        pytest.param(_Counter, id="dispatch-mode"),
        pytest.param(_Functions, id="function-mode"),
        pytest.param(forward_ad.dual_level, id="dual-level"),
        pytest.param(lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), id="profiler"),
    ],
)
def test_a_listener_hears_every_call(listener):
    x = torch.randn(2, 4)
    assert is_plain(x, (None,)) is TELLS_LISTENERS
    with listener():
        assert not is_plain(x, (None,))
    assert is_plain(x, (None,)) is TELLS_LISTENERS


def test_transforms_and_traces_go_through_the_dispatcher():
    heard = []

    def function(x):
        heard.append(is_plain(x, (None,)))
        return x * 2

    x = torch.randn(3, 4)
    torch.func.vmap(function)(x)
    torch.func.grad(lambda x: function(x).sum())(x)
    torch.jit.trace(function, (x,), check_trace=False)
    assert heard == [False] * 3


def test_gradients_need_a_node_of_autograd():
    x, bias = torch.randn(2, 4), nn.Parameter(torch.randn(4))
    assert not is_plain(x, (None, bias))
    assert not is_plain(x.clone().requires_grad_(), (None,))
    with torch.no_grad():
        assert is_plain(x, (None, bias)) is TELLS_LISTENERS


def _dual(module, x, dx):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(module(forward_ad.make_dual(x, dx))))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, where vmap calls an op for each row
@pytest.mark.parametrize("has_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
def test_forward_mode_has_the_derivatives_of_the_decoded_weight(weight_format, has_bias):
    torch.manual_seed(0)
    description = Description(format=weight_format, shape=(6, 128), dtype=torch.float32)
    module = QuantizedLinear(description, bias=torch.float32 if has_bias else None, device="cpu")
    module.load_state_dict({**module.quantize(torch.randn(6, 128)), **({"bias": torch.ones(6)} if has_bias else {})})
    x, dx, dense = torch.randn(3, 128), torch.randn(3, 128), module.dequantize()
    expected = dx @ dense.T
    with torch.no_grad():
        for out, change in (
            torch.func.jvp(module, (x,), (dx,)),
            _dual(module, x, dx),
        ):
            assert torch.equal(out, module(x))
            assert (change - expected).norm() <= 1e-5 * expected.norm()
        jacobian = torch.func.jacfwd(module)(x[0])
    assert (jacobian - dense).norm() <= 1e-5 * dense.norm()
    if has_bias:
        _, change = torch.func.jvp(
            lambda bias: torch.func.functional_call(module, {"bias": bias}, (x,)), (module.bias,), (torch.ones(6),)
        )
        assert torch.equal(change, torch.ones(3, 6))


class _Launched:
    """Plays bigq_kernels' part on CPU tensors that claim to be on a GPU: a launcher, its replay and counts of both."""

    def __init__(self, monkeypatch):
        self.counts = {"launcher": 0, "recorded": 0, "replayed": 0}
        self.replays = self.tried = True
        monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        if not TELLS_LISTENERS:  # all calls take the dispatcher, which sees that these tensors are on a CPU
            monkeypatch.setattr(eager, "something_listens", lambda: False)
        launcher = self.launcher  # one object: a method is made anew at each access
        monkeypatch.setattr(library, "cuda_implementation", lambda name: launcher)
        kernels = SimpleNamespace(record=self.record, can_replay=lambda: self.tried)
        monkeypatch.setitem(__import__("sys").modules, "bigq_kernels.replay", kernels)

    def launcher(self, x, weight, *rest):
        self.counts["launcher"] += 1
        return x @ weight.T

    def record(self, launcher, tensors, settings, live):
        self.counts["recorded"] += 1
        self.counts["launcher"] -= 1  # the call below
        return launcher(*tensors, *settings), self if self.replays else None

    def bind(self, pointers):
        from ctypes import c_float

        def replayed(x, inputs, live):
            self.counts["replayed"] += 1
            weight = torch.frombuffer((c_float * 32).from_address(pointers[0]), dtype=torch.float32).view(4, 8)
            return x @ weight.T

        return replayed


@pytest.fixture
def launched(monkeypatch):
    return _Launched(monkeypatch)


def test_where_listeners_are_not_told_every_call_goes_through_the_dispatcher(launched, monkeypatch):
    monkeypatch.setattr(eager, "something_listens", lambda: True)
    codes, absmax = library.quantize_4bit(torch.randn(4, 64), "nf4", 64)
    x, state, settings = torch.randn(1, 64), (codes, absmax, torch.randn(4), None, None), ("nf4", 64, 64)
    for _ in range(4):
        out = eager.linear("linear_4bit", x, state, settings)
        assert torch.equal(out, ops.linear_4bit(x, *state, *settings))
    assert launched.counts == {"launcher": 0, "recorded": 0, "replayed": 0}


def test_two_layers_share_a_recording_and_each_has_its_tensors(launched):
    x = torch.randn(1, 8)
    first, second = torch.randn(4, 8), torch.randn(4, 8)
    for weight in (first, first, first, second, first, second):
        assert torch.equal(eager.linear("linear_4bit", x, (weight, None, None), ("nf4",)), x @ weight.T)
    assert launched.counts == {"launcher": 1, "recorded": 1, "replayed": 4}


@pytest.mark.parametrize("tokens, settings", [(2, ("nf4",)), (1, ("fp4",))], ids=["other-shape", "other-settings"])
def test_other_looks_are_recorded_anew(launched, tokens, settings):
    weight = torch.randn(4, 8)
    for _ in range(3):
        eager.linear("linear_4bit", torch.randn(1, 8), (weight, None, None), ("nf4",))
    for _ in range(3):
        x = torch.randn(tokens, 8)
        assert torch.equal(eager.linear("linear_4bit", x, (weight, None, None), settings), x @ weight.T)
    assert launched.counts == {"launcher": 2, "recorded": 2, "replayed": 2}


def test_what_has_no_replay_goes_through_the_dispatcher(launched):
    launched.replays = False
    x, weight = torch.randn(1, 8), torch.randn(4, 8)
    for _ in range(5):
        eager.linear("linear_4bit", x, (weight, None, None), ("nf4",))
    assert launched.counts == {"launcher": 4, "recorded": 1, "replayed": 0}


def test_where_replays_do_not_work_or_were_not_tried_yet_the_launcher_does(launched):
    launched.tried = False
    x, weight = torch.randn(1, 8), torch.randn(4, 8)
    for _ in range(4):
        assert torch.equal(eager.linear("linear_4bit", x, (weight, None, None), ("nf4",)), x @ weight.T)
    assert launched.counts == {"launcher": 4, "recorded": 0, "replayed": 0}
    launched.tried = True  # the first try was while a graph was captured
    for _ in range(3):
        assert torch.equal(eager.linear("linear_4bit", x, (weight, None, None), ("nf4",)), x @ weight.T)
    assert launched.counts == {"launcher": 4, "recorded": 1, "replayed": 2}


def test_many_tokens_and_odd_strides_are_never_recorded(launched):
    weight = torch.randn(4, 8)
    for x in (torch.randn(replays.MAX_TOKENS + 1, 8), torch.randn(8, 2).T, torch.randn(0, 8), torch.randn(9)[1:]):
        for _ in range(3):
            assert torch.equal(eager.linear("linear_4bit", x, (weight, None, None), ("nf4",)), x @ weight.T)
    assert launched.counts == {"launcher": 12, "recorded": 0, "replayed": 0}


class _LaunchedStack(_Launched):
    """The same where a route stands between x and the weight."""

    def launcher(self, x, route, weight, *rest):
        return super().launcher(x, weight)


def test_rows_of_stacks_are_recorded_up_to_as_many_tokens(monkeypatch):
    """A token has several rows: 257 tokens of 8 experts each are more rows than a linear may have tokens."""
    launched = _LaunchedStack(monkeypatch)
    most, route, weight = replays.MAX_TOKENS * replays.MAX_ROWS_OF_A_TOKEN, torch.ones(3), torch.randn(4, 8)
    for rows in (replays.MAX_TOKENS + 1, most, most + 1):
        x = torch.randn(rows, 8)
        for _ in range(3):
            out = eager.routed("grouped_linear_4bit", x, route, (weight, None, None), ("nf4",))
            assert torch.equal(out, x @ weight.T)
    assert launched.counts == {"launcher": 5, "recorded": 2, "replayed": 2}


def test_a_weight_that_moved_is_bound_again(launched):
    x, weight = torch.randn(1, 8), nn.Parameter(torch.randn(4, 8), requires_grad=False)
    for _ in range(3):
        eager.linear("linear_4bit", x, (weight, None, None), ("nf4",))
    weight.data = torch.randn(4, 8)
    assert torch.equal(eager.linear("linear_4bit", x, (weight, None, None), ("nf4",)), x @ weight.T)


def test_a_tensor_of_another_dtype_at_the_same_address_is_bound_again(launched):
    """A model that is moved away, cast and moved back may find its old addresses."""
    x, weight = torch.randn(1, 8), torch.randn(4, 8)
    bias = nn.Parameter(torch.randn(4), requires_grad=False)
    for _ in range(3):
        eager.linear("linear_4bit", x, (weight, None, bias), ("nf4",))
    assert launched.counts == {"launcher": 1, "recorded": 1, "replayed": 1}
    address = bias.data_ptr()
    bias.data = bias.data.view(torch.float16)[:4]
    assert bias.data_ptr() == address
    for _ in range(3):
        eager.linear("linear_4bit", x, (weight, None, bias), ("nf4",))
    assert launched.counts == {"launcher": 2, "recorded": 2, "replayed": 2}


class _Checked(_Launched):
    """A launcher that refuses what the real one does, before it multiplies."""

    def launcher(self, x, weight, *rest):
        if x.shape[-1] != weight.shape[-1] or weight.dtype is not torch.float32:
            raise RuntimeError("refused")
        return super().launcher(x, weight)


@pytest.mark.parametrize("wrong", ["width", "dtype"])
def test_what_a_launcher_refuses_is_refused_each_time_also_after_a_replay_was_bound(monkeypatch, wrong):
    played = _Checked(monkeypatch)
    x, weight = torch.randn(1, 8), nn.Parameter(torch.randn(4, 8), requires_grad=False)
    for _ in range(3):
        assert torch.equal(eager.linear("linear_4bit", x, (weight, None, None), ("nf4",)), x @ weight.T)
    assert played.counts["replayed"] == 1
    right = weight.data
    bad = torch.randn(1, 12) if wrong == "width" else x
    if wrong == "dtype":
        weight.data = right.view(torch.int32)
        assert weight.data_ptr() == right.data_ptr()
    for _ in range(4):
        with pytest.raises(RuntimeError, match="refused"):
            eager.linear("linear_4bit", bad, (weight, None, None), ("nf4",))
    assert played.counts["replayed"] == 1
    weight.data = right
    assert torch.equal(eager.linear("linear_4bit", x, (weight, None, None), ("nf4",)), x @ right.T)


def test_nothing_outlives_a_weight(launched):
    x = torch.randn(1, 8)
    for _ in range(5):
        weight = torch.randn(4, 8)
        for _ in range(3):
            assert torch.equal(eager.linear("linear_4bit", x, (weight, None, None), ("nf4",)), x @ weight.T)
        assert len(replays._CALLS) == 1
        del weight
        gc.collect()
        assert not replays._CALLS


def test_memory_that_a_weight_has_again_is_bound_once(launched):
    """As FSDP2 gathers a weight into the same few buffers, whether in one object or in another."""
    x, bound, bind = torch.randn(1, 8), [], launched.bind
    launched.bind = lambda pointers: bound.append(pointers) or bind(pointers)
    buffers, weight = [torch.randn(4, 8), torch.randn(4, 8)], nn.Parameter(torch.randn(4, 8), requires_grad=False)
    for turn in range(8):
        weight.data = buffers[turn % 2]
        for each in (weight, weight.detach()):
            out = eager.linear("linear_4bit", x, (each, None, None), ("nf4",))
            assert torch.equal(out, x @ buffers[turn % 2].T)
    assert launched.counts == {"launcher": 1, "recorded": 1, "replayed": 14}
    del each
    assert len(bound) == 2
    assert len(replays._CALLS) == 1


@pytest.mark.parametrize("other", [(4, 8), (2, 8)], ids=["transposed", "fewer-rows"])
def test_other_looks_at_the_same_address_are_not_what_was_bound(launched, other):
    memory, x = torch.randn(32), torch.randn(1, 8)
    for _ in range(3):
        state = (memory.view(4, 8), None, None)
        replays.run(library.cuda_implementation, "linear_4bit_backward", x, state, ("nf4",))
    second = memory.view(8, 4).T if other == (4, 8) else memory[:16].view(2, 8)
    assert (second.shape, second.data_ptr()) == (other, memory.data_ptr())
    for _ in range(2):
        state = (second, None, None)
        out = replays.run(library.cuda_implementation, "linear_4bit_backward", x, state, ("nf4",))
        assert torch.equal(out, x @ second.T)
    assert launched.counts == {"launcher": 2, "recorded": 2, "replayed": 1}


def test_what_is_kept_is_bounded(launched, monkeypatch):
    monkeypatch.setattr(replays, "MAX_KEPT", 3)
    x, weights = torch.randn(1, 8), [torch.randn(4, 8) for _ in range(9)]
    for weight in [weights[0], *weights]:
        eager.linear("linear_4bit", x, (weight, None, None), ("nf4",))
    assert 0 < len(replays._CALLS) <= 3
    assert 0 < len(replays._BOUND) <= 3


@pytest.fixture(params=FORMATS, ids=lambda fmt: f"{fmt.name}-{list(fmt.describe().values())[-1]}")
def layer(request):
    weight = torch.randn(512, 1024, device="cuda")
    description = Description(format=request.param, shape=(512, 1024), dtype=torch.bfloat16, compute_dtype=None)
    made = QuantizedLinear(description, bias=torch.bfloat16, device="cuda")
    made.load_state_dict({**made.quantize(weight), "bias": torch.randn(512)})
    return made


def _through_the_dispatcher(layer, x):
    with _Functions():
        return layer(x)


def _by_the_launcher(layer, x):
    op, _, settings = layer._product
    return ops.cuda_implementation(op)(x, *[layer._parameters[name] for name in layer._tensor_names], *settings)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 16, 64, 128, 200])
def test_has_the_bits_of_the_op(layer, m, dtype):
    with torch.inference_mode():
        for _ in range(6):
            x = torch.randn(1, m, 1024, device="cuda", dtype=dtype)
            expected = _by_the_launcher(layer, x)
            assert torch.equal(layer(x), expected)
            assert torch.equal(_through_the_dispatcher(layer, x), expected)
            layer.bias.add_(1)
    if m <= 16 and dtype != torch.float32:
        assert [call for call in replays._CALLS.values() if call.replay is not None]


def _state(fmt, n, k):
    """A name of an op, the tensors of a quantized weight with the bias among them, and the settings."""
    weight, bias = torch.randn(n, k, device="cuda"), torch.randn(n, device="cuda", dtype=torch.bfloat16)
    if fmt == "int8":
        codes, absmax = ops.quantize_int8(weight)
        return "linear_int8", (codes, absmax, bias), (6.0,)
    codes, absmax = ops.quantize_4bit(weight, "nf4", 64)
    if fmt == "nf4":
        return "linear_4bit", (codes, absmax, bias, None, None), ("nf4", 64, k)
    nested, *pair = ops.quantize_absmax(absmax)
    return "linear_4bit", (codes, nested, bias, *pair), ("nf4", 64, k)


def _bits(state):
    """Scales as the bits of their floats, in memory of their own; the bias is the third tensor."""
    return tuple(
        t.view(torch.int32).clone() if t is not None and i != 2 and t.dtype == torch.float32 else t
        for i, t in enumerate(state)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ["nf4", "nf4-double-quant", "int8"])
@pytest.mark.parametrize("m", [1, 3, 16, 64, 200])
def test_the_bits_of_scales_have_the_bits_of_their_floats_replayed_too(fmt, m):
    name, floats, settings = _state(fmt, 512, 1024)
    bits = _bits(floats)
    for _ in range(5):
        x = torch.randn(1, m, 1024, device="cuda", dtype=torch.bfloat16)
        expected = getattr(ops, name)(x, *floats, *settings)
        assert torch.equal(eager.linear(name, x, bits, settings), expected)
    if m <= 16:
        assert [call.replay is not None for call in replays._CALLS.values()] == [True]


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ["nf4", "nf4-double-quant", "int8"])
def test_a_wrong_width_or_dtype_is_refused_after_a_replay_was_bound(fmt):
    name, state, settings = _state(fmt, 512, 1024)
    state = [None if t is None else nn.Parameter(t, requires_grad=False) for t in _bits(state)]
    x = torch.randn(1, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(4):
            expected = eager.linear(name, x, tuple(state), settings)
        for k in (512, 1023, 1056, 2048):
            for _ in range(3):
                with pytest.raises(RuntimeError, match="in_features"):
                    eager.linear(name, x.new_zeros(1, k), tuple(state), settings)
        scales = state[1] if state[1].dtype == torch.int32 else state[3]
        right = scales.data
        scales.data = right.to(torch.bfloat16)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="bfloat16"):
                eager.linear(name, x, tuple(state), settings)
        scales.data = right
        assert torch.equal(eager.linear(name, x, tuple(state), settings), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("m", [1, 16])
def test_compiled_code_repeats_launches_too(layer, m, grad):
    torch.compiler.reset()  # each case counts towards the limit of recompilations
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(5):
        x = torch.randn(1, m, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=grad)
        with torch.set_grad_enabled(grad):
            out = compiled(x)
        assert torch.equal(out, _by_the_launcher(layer, x.detach()))
        if grad:
            out.sum().backward()
            exact = layer.dequantize(torch.float32).sum(dim=0)
            assert ((x.grad.float() - exact).norm() / (exact.norm() * m**0.5)).item() < 1e-2
    assert [call for call in replays._CALLS.values() if call.replay is not None]


@pytest.mark.gpu
def test_streams_and_graphs(layer):
    x = torch.randn(1, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(3):
            expected = layer(x)
        streams = [torch.cuda.Stream() for _ in range(4)]
        outs = []
        torch.cuda.synchronize()
        for _ in range(50):
            for stream in streams:
                with torch.cuda.stream(stream):
                    outs.append(layer(x))
        torch.cuda.synchronize()
        assert all(torch.equal(out, expected) for out in outs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(x)
        x.neg_()
        graph.replay()
        assert torch.equal(captured, layer(x))
