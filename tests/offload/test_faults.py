"""Faults of offloaded models: interrupts anywhere, threads that cannot start, forks. What comes next is right."""

import _thread
import copy
import gc
import os
import random
import signal
import sys
import time

import pytest
import torch
from torch import nn

from bigq import QuantizationConfig, load_and_quantize_model, materialize
from bigq.formats import TensorSpec
from bigq.offload.attach import attach, hooks_of
from bigq.offload.block import OffloadedBlock
from bigq.offload.hooks import PlacementHook
from bigq.offload.prefetch import Prefetcher
from bigq.offload.space import OffloadSpace, is_file_backed
from bigq.system.machine import usable_cores

CPU, WIDTH = torch.device("cpu"), 16
SIGNALS = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs signals of POSIX")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.up(self.norm(x)))


@pytest.fixture
def pair(tmp_path):
    """(a model of five layers that are offloaded to a file, the same model resident)."""
    plain = nn.Sequential(*(Layer() for _ in range(5))).requires_grad_(False)
    model = copy.deepcopy(plain)
    named = dict(model.named_parameters())
    space = OffloadSpace.in_file(
        tmp_path, {name: TensorSpec(shape=tuple(p.shape), dtype=p.dtype) for name, p in named.items()}
    )
    for name, parameter in named.items():
        parameter.data = space.empty(name).copy_(parameter.data)
    prefetcher = Prefetcher(CPU)
    for layer in model:
        block = OffloadedBlock([(owner, leaf) for owner in layer.modules() for leaf in owner._parameters], ahead=True)
        prefetcher.add(block)
        attach(layer, PlacementHook(CPU, block=block, prefetcher=prefetcher))
    return model, plain


def interrupted_after(seconds, call):
    """Run `call`, and raise KeyboardInterrupt somewhere in it, `seconds` from now, unless it ends before."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGALRM, before)


def held():
    """Threads and descriptors of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def is_as_between_calls(model, own):
    """Whether every block holds its own tensors, and autograd has no hook."""
    return (
        all(p.data_ptr() == own[name] for name, p in model.named_parameters())
        and not any(layer._hf_hook.block.calls for layer in model)
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    )


@SIGNALS
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads and descriptors in /proc")
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "backward"])
def test_an_interrupted_call_leaves_nothing_and_the_next_is_right(pair, grad, monkeypatch):
    # One that comes in a __del__ is swallowed by Python; pytest would keep its frames.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    model, plain = pair
    own = {name: p.data_ptr() for name, p in model.named_parameters()}
    draw = random.Random(0)
    x = torch.randn(3, WIDTH, requires_grad=grad)
    expected = plain(x)
    if grad:
        (expected_grad,) = torch.autograd.grad(expected.sum(), x)

    def run():
        with torch.set_grad_enabled(grad):
            y = model(x)
        return (y, torch.autograd.grad(y.sum(), x)[0]) if grad else (y, None)

    run()
    began = time.perf_counter()
    run()
    usual_s, before = time.perf_counter() - began, held()
    for i in range(150):
        interrupted_after(draw.uniform(1e-6, 1.2 * usual_s), run)
        torch.set_grad_enabled(True)  # the interrupt may have come before `run` had left its own context
        assert is_as_between_calls(model, own), i
        y, got = run()
        assert torch.equal(y, expected), i
        assert got is None or torch.equal(got, expected_grad), i
    threads, descriptors = held()
    assert threads <= before[0] + usable_cores()  # a pool starts its threads one by one
    assert descriptors == before[1]


@SIGNALS
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads and descriptors in /proc")
def test_an_interrupted_materialize_moves_everything_or_nothing(tiny, checkpoint, empty, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)

    def load():
        return load_and_quantize_model(
            empty(tiny),
            checkpoint,
            QuantizationConfig("nf4"),
            {"": "cpu", "blocks": "disk", "head": "disk"},
            offload="quantized",
            offload_folder=tmp_path,
            progress=False,
        )

    def look(model):
        hooks = {name: hooks_of(module) for name, module in model.named_modules() if hasattr(module, "_hf_hook")}
        attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
        return sorted(hooks), attributes, {name: is_file_backed(tensor) for name, tensor in model.state_dict().items()}

    model = load()
    state, offloaded, expected = model.state_dict(), look(model), model(ids)
    usual_s = []
    for _ in range(3):
        model = load()
        began = time.perf_counter()
        materialize(model)
        usual_s.append(time.perf_counter() - began)
    moved, draw, outcomes = look(model), random.Random(0), []
    del model
    before = held()
    for i in range(80):
        model = load()
        interrupted_after(draw.uniform(1e-6, min(usual_s)), lambda model=model: materialize(model))
        outcomes.append(look(model))
        assert outcomes[-1] in (offloaded, moved), i
        assert torch.equal(model(ids), expected), i
        began = time.perf_counter()
        materialize(model)
        if outcomes[-1] == offloaded:
            usual_s.append(time.perf_counter() - began)  # a busy machine may have been slower before
        assert look(model) == moved, i
        assert torch.equal(model(ids), expected), i
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()), i
    assert outcomes.count(offloaded) > 20, "most interrupts came before the end"
    del model
    threads, descriptors = held()
    assert threads <= before[0] + usable_cores()
    assert descriptors == before[1]


def test_a_read_that_could_not_be_started_is_never_taken_for_done(pair, monkeypatch):
    model, plain = pair
    real, calls = _thread.start_new_thread, []

    def start(*args):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("can't start new thread")
        return real(*args)

    monkeypatch.setattr(_thread, "start_new_thread", start)
    x = torch.randn(3, WIDTH)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="can't start new thread"):
            model(x)
        for _ in range(4):
            assert torch.equal(model(x), plain(x))


def test_a_thread_that_could_not_be_started_is_done_without(pair, monkeypatch):
    model, plain = pair
    real, calls = _thread.start_new_thread, []

    def start(*args):
        calls.append(args)
        if len(calls) > 1:
            raise RuntimeError("can't start new thread")
        return real(*args)

    monkeypatch.setattr(_thread, "start_new_thread", start)
    x = torch.randn(3, WIDTH)
    for _ in range(4):
        assert torch.equal(model(x), plain(x))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_process_runs_a_model_that_its_parent_ran(pair):
    model, plain = pair
    x = torch.randn(3, WIDTH)
    expected = plain(x)
    assert torch.equal(model(x), expected)
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(model(x), expected) and torch.equal(model(x), expected) else 3)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert torch.equal(model(x), expected)
