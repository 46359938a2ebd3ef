"""launch: kernels start on the device of their tensors, whichever is the current one."""

from contextlib import contextmanager

import pytest
import torch

from bigq_kernels import launch as launches
from bigq_kernels.launch import launch
from bigq_kernels.rows import sort_rows


class OfSecondGpu(torch.Tensor):
    """A tensor on a CPU that claims to be on the second GPU."""

    device = torch.device("cuda", 1)


class Kernel:
    """Notes on which GPU it was started, and does nothing else."""

    arg_names = ("x", "count")

    def __init__(self, gpus):
        self.gpus, self.started = gpus, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.started.append(self.gpus["current"])


@pytest.fixture
def gpus(monkeypatch):
    """Which GPU is the current one, of some that are not there."""
    known = {"current": 0}

    @contextmanager
    def device_of(tensor):
        before, known["current"] = known["current"], tensor.device.index
        yield
        known["current"] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: known["current"])
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    return known


@pytest.mark.parametrize("current", [0, 1])
def test_a_kernel_starts_on_the_gpu_of_its_first_tensor(gpus, current):
    gpus["current"] = current
    kernel = Kernel(gpus)
    launch(kernel, (1,), torch.zeros(4).as_subclass(OfSecondGpu), 4, options={"num_warps": 1})
    assert kernel.started == [1]
    assert gpus["current"] == current
    assert not [key for key in launches._COMPILED if key[0] == id(kernel)]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_rows_on_a_gpu_that_is_not_the_current_one():
    ids = torch.randint(0, 8, (300,))
    first, second = (sort_rows(ids.to(device), 8) for device in ("cuda:0", "cuda:1"))
    assert all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(first, second, strict=True))
