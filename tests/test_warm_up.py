"""WarmUp: nothing on a CPU, and on a GPU an error that surfaces."""

import threading

import pytest
import torch

from bigq import QuantizationConfig
from bigq.formats import Block4
from bigq.model_tensors import ModelTensors
from bigq.warm_up import WarmUp


@pytest.fixture
def source():
    return ModelTensors(torch.nn.Linear(3, 3))


@pytest.mark.parametrize(
    "config, device", [(QuantizationConfig("nf4"), "cpu"), (None, "cuda")], ids=["on the CPU", "nothing to quantize"]
)
def test_nothing_to_warm_up(source, config, device):
    before = threading.active_count()
    warm_up = WarmUp(config, source, torch.device(device))
    assert threading.active_count() == before
    warm_up.wait()


def test_an_error_is_raised_by_wait(source, monkeypatch):
    def broken(self, weight):
        raise RuntimeError("no driver")

    monkeypatch.setattr(Block4, "quantize", broken)
    monkeypatch.setattr(torch, "zeros", lambda shape, *, dtype, device: None)  # no GPU is needed to fail
    warm_up = WarmUp(QuantizationConfig("nf4"), source, torch.device("cuda:0"))
    with pytest.raises(RuntimeError, match="no driver"):
        warm_up.wait()


@pytest.mark.gpu
def test_it_quantizes_each_dtype_once(source, monkeypatch):
    seen = []
    plain = Block4.quantize
    monkeypatch.setattr(Block4, "quantize", lambda self, weight: seen.append(weight) or plain(self, weight))
    WarmUp(QuantizationConfig("nf4"), source, torch.device("cuda:0")).wait()
    assert [(weight.dtype, weight.device.type) for weight in seen] == [(torch.float32, "cuda")]
