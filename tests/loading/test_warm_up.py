"""WarmUp: nothing on a CPU, and on a GPU an error that surfaces."""

import os
import sys
import time
from functools import partial

import pytest
import torch

from bigq import InputMoments, QuantizationConfig
from bigq.checkpoint import Checkpoint, ScaledRows, with_scaled
from bigq.formats import NF4, Block4
from bigq.loading.warm_up import WarmUp
from bigq.model.in_place import ModelTensors
from interrupts import interrupted_at, points_of
from scaled_checkpoints import in_fp8, write


@pytest.fixture
def source():
    return ModelTensors(torch.nn.Linear(3, 3))


@pytest.mark.parametrize(
    "config, device", [(QuantizationConfig("nf4"), "cpu"), (None, "cuda")], ids=["on the CPU", "nothing to quantize"]
)
def test_nothing_to_warm_up(source, config, device):
    before = len(os.listdir("/proc/self/task"))
    warm_up = WarmUp(config, source, torch.device(device))
    assert len(os.listdir("/proc/self/task")) == before
    warm_up.wait()


def test_an_error_is_raised_by_wait(source, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch, "zeros", broken)
    warm_up = WarmUp(QuantizationConfig("nf4"), source, torch.device("cuda:0"))
    with pytest.raises(RuntimeError, match="no driver"):
        warm_up.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_no_thread_is_left(source, monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: time.sleep(0.2))
    before = len(os.listdir("/proc/self/task"))
    with WarmUp(QuantizationConfig("nf4"), source, torch.device("cuda:0")):
        assert len(os.listdir("/proc/self/task")) == before + 1
    while len(os.listdir("/proc/self/task")) > before:  # it ends a moment after what it ran
        time.sleep(0.01)


def test_its_thread_is_joined_wherever_an_interrupt_comes(source):
    class Thread:
        joined = False

        def join(self):
            self.joined = True

    def left():
        warm_up = WarmUp(None, source, torch.device("cuda:0"))
        warm_up._thread = Thread()
        return warm_up

    points = points_of(partial(left().__exit__, None, None, None), ("loading/warm_up", "system/interrupts"))
    inside = [point for point in points if point.code is not WarmUp.__exit__.__code__ or point.position is not None]
    assert inside
    for point in inside:
        warm_up = left()
        with pytest.raises(KeyboardInterrupt):
            interrupted_at(point, partial(warm_up.__exit__, None, None, None))
        assert warm_up._thread.joined, str(point)


def test_what_it_runs_is_what_a_load_runs(source, monkeypatch):
    launches, plain, zeros = [], Block4.quantize_rows, torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, dtype, device: zeros(*args, dtype=dtype))
    monkeypatch.setattr(
        Block4, "quantize_rows", lambda self, rows, **how: launches.append(rows) or plain(self, rows, **how)
    )
    WarmUp(QuantizationConfig("nf4"), source, torch.device("cuda:0")).wait()
    assert [(rows.dtype, tuple(rows.shape)) for rows in launches] == [(torch.float32, (16, 4096))]


def test_it_searches_if_the_load_does(source, monkeypatch):
    launches, plain, zeros = [], NF4.quantize_rows, torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, dtype, device: zeros(*args, dtype=dtype))
    monkeypatch.setattr(
        NF4,
        "quantize_rows",
        lambda self, rows, **how: launches.append((len(rows), how["method"])) or plain(self, rows, **how),
    )
    for moments, expected in ((None, [(16, "absmax")]), (InputMoments({}), [(8, "search"), (8, "search")])):
        launches.clear()
        config = QuantizationConfig("nf4", rules={"a": "int8"}, method="search", moments=moments)
        WarmUp(config, source, torch.device("cuda:0")).wait()
        assert launches == expected


def test_it_searches_whatever_the_default_dtype(source, monkeypatch):
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, dtype, device: zeros(*args, dtype=dtype))
    config = QuantizationConfig("nf4", method="search", moments=InputMoments({}))
    try:
        torch.set_default_dtype(torch.bfloat16)
        WarmUp(config, source, torch.device("cuda:0")).wait()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.gpu
def test_it_quantizes_each_dtype_once(source, monkeypatch):
    seen = []
    plain = Block4.quantize_rows
    monkeypatch.setattr(
        Block4, "quantize_rows", lambda self, rows, **how: seen.append(rows) or plain(self, rows, **how)
    )
    WarmUp(QuantizationConfig("nf4"), source, torch.device("cuda:0")).wait()
    assert [(weight.dtype, weight.device.type) for weight in seen] == [(torch.float32, "cuda")]


def test_it_decodes_each_kind_of_codes_once(tmp_path, monkeypatch):
    """A row of each, with scales that are on the GPU as well: torch loads kernels at their first call."""
    decoded, plain, zeros = [], ScaledRows.decode, torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, dtype, device=None: zeros(*args, dtype=dtype))
    monkeypatch.setattr(ScaledRows, "decode", lambda self, *args: decoded.append(plain(self, *args)) or decoded[-1])
    tensors = {"stack_blocks": torch.zeros(2, 8, 2, 16, dtype=torch.uint8)}
    tensors["stack_scales"] = torch.zeros(2, 8, 2, dtype=torch.uint8)
    for name in "ab":
        codes, scales = in_fp8(torch.randn(64, 96), (64, 96))
        tensors |= {name: codes, f"{name}_scale": scales}
    write(tmp_path, tensors)
    source = with_scaled(Checkpoint.open(tmp_path), tmp_path)
    WarmUp(QuantizationConfig("nf4"), source, torch.device("cuda:0")).wait()
    assert sorted(tuple(made.shape) for made in decoded) == [(1, 64, 8), (1, 96)]
    assert all(not made.any() for made in decoded)
