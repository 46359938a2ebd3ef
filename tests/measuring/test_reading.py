"""Reading: medians and quartiles by hand, and a call that is counted."""

import time

import pytest
import torch

from bigq.measuring.reading import Reading, read_call

CPU = torch.device("cpu")


def test_the_median_and_half_the_distance_of_the_quartiles():
    assert Reading.of([5.0]) == Reading(value=5.0)
    assert Reading.of([4.0, 1.0, 3.0, 2.0, 100.0]) == Reading(value=3.0, spread=(4 - 2) / 2 / 3)
    assert Reading.of([1.0, 2.0], factor=1e6) == Reading(value=1.5e6, spread=(2 - 1) / 2 / 1.5)
    assert Reading.of([0.0, 0.0]) == Reading(value=0.0, spread=0.0)


def test_warm_ups_are_called_and_not_measured():
    calls = []

    def call():
        time.sleep(0.05 if not calls else 0.001)
        calls.append(0)

    found = read_call(call, CPU, repeats=3, warm_ups=1, factor=1e3)
    assert len(calls) == 4
    assert 1 <= found.value < 50
    assert found.spread is not None


@pytest.mark.gpu
def test_the_gpu_is_waited_for():
    square = torch.randn(4096, 4096, device="cuda")
    found = read_call(lambda: [square @ square for _ in range(20)], torch.device("cuda"), repeats=3)
    assert found.value > 20 * 2 * 4096**3 / 1e15  # seconds: no GPU multiplies float32 at 1000 Tflop/s
