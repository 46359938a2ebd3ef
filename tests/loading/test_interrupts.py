"""Loads that are interrupted anywhere: the model is as it was, nothing stays open, and the next load works."""

import gc
import os
import random
import signal
import sys
import time

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file

from bigq import QuantizationConfig, load_and_quantize_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts threads and descriptors in /proc")


def held(expected=None):
    """Threads and descriptors of this process, once those that are ending have ended; waits for `expected`, up to 5 s.

    A thread that was joined may live a moment longer, on a busy machine more than 20 ms.
    """
    gc.collect()
    deadline, found = time.monotonic() + 5, None
    while found is None or (found != expected and expected is not None and time.monotonic() < deadline):
        time.sleep(0.02)
        found = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
    return found


def look(model):
    return [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()], {
        name: (type(tensor), tensor.device, tensor.dtype) for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_interrupted_load_leaves_nothing(place, tiny, tmp_path, monkeypatch):
    # One that comes in a __del__ is swallowed by Python; pytest would keep its frames, and with them what is open.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    save_file(tiny().state_dict(), tmp_path / "model.safetensors")

    def load(model):
        return load_and_quantize_model(
            model,
            tmp_path / "model.safetensors",
            QuantizationConfig("nf4"),
            {"": place},
            offload="quantized",
            offload_folder=tmp_path / "off",
            progress=False,
        )

    def skeleton():
        with init_empty_weights():
            return tiny()

    load(skeleton())
    began = time.perf_counter()
    expected = load(skeleton()).state_dict()
    usual_s, draw = time.perf_counter() - began, random.Random(0)
    before, plain = held(), look(skeleton())

    def interrupt(*_):
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(60):
            model, done = skeleton(), False
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-6, usual_s))
                    load(model)
                    done = True
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
            if not done and not hasattr(model, "quantization_report"):  # else it came after the last step
                assert look(model) == plain, i
    finally:
        signal.signal(signal.SIGALRM, handler)
    del model
    assert held(before) == before
    again = load(skeleton()).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
