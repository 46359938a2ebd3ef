"""The eager call gives what the op gives, and goes past the dispatcher only where the dispatcher would do nothing."""

import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bigq import QuantizedLinear, eager, ops
from bigq.formats import Block4, Description, Int8

FORMATS = [
    Block4(quant_type="nf4"),
    Block4(quant_type="fp4", block_size=128, double_quant=True),
    Int8(),
    Int8(threshold=0.0),
]


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """Not here: filling what a launcher allocates is work of torch's that no replay can repeat."""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    for name, empty in (("_CALLS", {}), ("_REPLAYS", {}), ("_SEEN", set())):
        monkeypatch.setattr(eager, name, empty)


class _Counter(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Functions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_this_torch_can_tell_what_listens():
    assert eager._TELL is not None


@pytest.mark.parametrize(
    "listener",
    [
        pytest.param(_Counter, id="dispatch-mode"),
        pytest.param(_Functions, id="function-mode"),
        pytest.param(lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), id="profiler"),
    ],
)
def test_a_listener_hears_every_call(listener):
    x = torch.randn(2, 4)
    assert eager._is_plain(x, (None,))
    with listener():
        assert not eager._is_plain(x, (None,))
    assert eager._is_plain(x, (None,))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace`:DeprecationWarning")
def test_transforms_and_traces_go_through_the_dispatcher():
    heard = []

    def function(x):
        heard.append(eager._is_plain(x, (None,)))
        return x * 2

    x = torch.randn(3, 4)
    torch.func.vmap(function)(x)
    torch.func.grad(lambda x: function(x).sum())(x)
    torch.jit.trace(function, (x,), check_trace=False)
    assert heard == [False] * 3


def test_gradients_go_through_the_dispatcher():
    x, bias = torch.randn(2, 4), nn.Parameter(torch.randn(4))
    assert not eager._is_plain(x, (None, bias))
    assert not eager._is_plain(x.clone().requires_grad_(), (None,))
    with torch.no_grad():
        assert eager._is_plain(x, (None, bias))


class _Launched:
    """Plays bigq_kernels' part on CPU tensors that claim to be on a GPU: a launcher, its replay and counts of both."""

    def __init__(self, monkeypatch):
        self.counts = {"launcher": 0, "recorded": 0, "replayed": 0}
        self.replays = True
        monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        monkeypatch.setattr(ops, "cuda_launcher", lambda name: self.launcher)
        kernels = SimpleNamespace(record=self.record)
        monkeypatch.setitem(__import__("sys").modules, "bigq_kernels.replay", kernels)

    def launcher(self, x, weight, *rest):
        return x @ weight.T

    def record(self, launcher, tensors, settings):
        self.counts["recorded"] += 1
        return launcher(*tensors, *settings), self if self.replays else None

    def bind(self, pointers):
        from ctypes import c_float

        def replayed(x, inputs):
            self.counts["replayed"] += 1
            weight = torch.frombuffer((c_float * 32).from_address(pointers[0]), dtype=torch.float32).view(4, 8)
            return x @ weight.T

        return replayed


@pytest.fixture
def launched(monkeypatch):
    played = _Launched(monkeypatch)

    def op(x, weight, *rest):
        played.counts["launcher"] += 1
        return x @ weight.T

    monkeypatch.setattr(ops, "linear_4bit", op)
    return played


def test_two_layers_share_a_recording_and_each_has_its_tensors(launched):
    x = torch.randn(1, 8)
    first, second = torch.randn(4, 8), torch.randn(4, 8)
    for weight in (first, first, first, second, first, second):
        assert torch.equal(eager.linear("linear_4bit", x, (weight, None), ("nf4",)), x @ weight.T)
    assert launched.counts == {"launcher": 1, "recorded": 1, "replayed": 4}


@pytest.mark.parametrize("tokens, settings", [(2, ("nf4",)), (1, ("fp4",))], ids=["other-shape", "other-settings"])
def test_other_looks_are_recorded_anew(launched, tokens, settings):
    weight = torch.randn(4, 8)
    for _ in range(3):
        eager.linear("linear_4bit", torch.randn(1, 8), (weight,), ("nf4",))
    for _ in range(3):
        x = torch.randn(tokens, 8)
        assert torch.equal(eager.linear("linear_4bit", x, (weight,), settings), x @ weight.T)
    assert launched.counts == {"launcher": 2, "recorded": 2, "replayed": 2}


def test_what_has_no_replay_goes_through_the_dispatcher(launched):
    launched.replays = False
    x, weight = torch.randn(1, 8), torch.randn(4, 8)
    for _ in range(5):
        eager.linear("linear_4bit", x, (weight,), ("nf4",))
    assert launched.counts == {"launcher": 4, "recorded": 1, "replayed": 0}


def test_many_tokens_and_odd_strides_are_never_recorded(launched):
    weight = torch.randn(4, 8)
    for x in (torch.randn(eager.MAX_TOKENS + 1, 8), torch.randn(8, 2).T, torch.randn(0, 8), torch.randn(9)[1:]):
        for _ in range(3):
            assert torch.equal(eager.linear("linear_4bit", x, (weight,), ("nf4",)), x @ weight.T)
    assert launched.counts == {"launcher": 12, "recorded": 0, "replayed": 0}


def test_a_weight_that_moved_is_bound_again(launched):
    x, weight = torch.randn(1, 8), nn.Parameter(torch.randn(4, 8), requires_grad=False)
    for _ in range(3):
        eager.linear("linear_4bit", x, (weight,), ("nf4",))
    weight.data = torch.randn(4, 8)
    assert torch.equal(eager.linear("linear_4bit", x, (weight,), ("nf4",)), x @ weight.T)


def test_nothing_outlives_a_weight(launched):
    x = torch.randn(1, 8)
    for _ in range(5):
        weight = torch.randn(4, 8)
        for _ in range(3):
            assert torch.equal(eager.linear("linear_4bit", x, (weight,), ("nf4",)), x @ weight.T)
        assert len(eager._CALLS) == 1
        del weight
        gc.collect()
        assert not eager._CALLS


def test_what_is_kept_is_bounded(launched, monkeypatch):
    monkeypatch.setattr(eager, "MAX_KEPT", 3)
    x, weights = torch.randn(1, 8), [torch.randn(4, 8) for _ in range(9)]
    for weight in [weights[0], *weights]:
        eager.linear("linear_4bit", x, (weight,), ("nf4",))
    assert 0 < len(eager._CALLS) <= 3


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 16, 64, 128, 200])
def test_has_the_bits_of_the_op(layer, m, dtype):
    with torch.inference_mode():
        for _ in range(6):
            x = torch.randn(1, m, 1024, device="cuda", dtype=dtype)
            out = layer(x)
            assert torch.equal(out, _through_the_dispatcher(layer, x))
            layer.bias.add_(1)
    if m <= 16 and dtype != torch.float32:
        assert [call for call in eager._CALLS.values() if call.replay is not None]


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
