"""What is known of a GPU, asked of a device and by name."""

from types import SimpleNamespace

import pytest
import torch
import triton

from bigq_kernels.gpu import Gpu


@pytest.fixture
def gpu_of(monkeypatch):
    """gpu_of(capability, release, **properties): the Gpu of a pretended CUDA device under a release of Triton."""

    monkeypatch.setattr("bigq_kernels.gpu.GLUON_RELEASES", ((3, 6), (3, 7)))

    def of(capability, release, **properties):
        major, minor = capability
        described = SimpleNamespace(
            major=major, minor=minor, multi_processor_count=100, shared_memory_per_block=48 << 10, **properties
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: described)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        monkeypatch.setattr(triton, "__version__", release)
        return Gpu.of.__wrapped__(torch.device("cuda", 0))

    return of


@pytest.mark.parametrize(
    "release, gluon", [("3.5.1", False), ("3.6.0", True), ("3.7.1+git12", True), ("3.8.0", False), ("4.6.0", False)]
)
def test_gluon_runs_with_the_releases_it_is_tested_with(release, gluon, gpu_of):
    assert gpu_of((9, 0), release).gluon is gluon


@pytest.mark.parametrize("release, bulk", [("3.5.1", False), ("3.6.0", True), ("3.8.0", True), ("3.9.0", False)])
def test_bulk_runs_where_its_warps_do_not_all_wait_for_each_other(release, bulk, gpu_of):
    assert gpu_of((9, 0), release).bulk is bulk
    assert not gpu_of((8, 0), release).bulk


@pytest.mark.parametrize(
    "capability, gluon, pdl", [((7, 5), False, False), ((8, 0), True, False), ((9, 0), True, True)], ids=str
)
def test_features_by_compute_capability(capability, gluon, pdl, gpu_of):
    gpu = gpu_of(capability, "3.6.0")
    assert (gpu.capability, gpu.ptx, gpu.gluon, gpu.pdl) == (capability, True, gluon, pdl)


def test_amds_gpus_take_no_ptx(gpu_of, monkeypatch):
    gpu_of((9, 4), "3.6.0")
    monkeypatch.setattr(torch.version, "cuda", None)
    gpu = Gpu.of.__wrapped__(torch.device("cuda", 0))
    assert (gpu.ptx, gpu.gluon, gpu.pdl) == (False, False, False)


def test_shared_memory_is_what_a_program_may_ask_for(gpu_of):
    assert gpu_of((8, 9), "3.6.0", shared_memory_per_block_optin=99 << 10).shared_nbytes == 99 << 10
    assert gpu_of((9, 4), "3.6.0").shared_nbytes == 48 << 10  # AMD: no other number


def test_without_a_gpu_it_is_an_h100_that_takes_no_ptx():
    h100, cpu = Gpu.named("h100"), Gpu.of(torch.device("cpu"))
    assert (h100.ptx, h100.pdl, h100.gluon, h100.bulk) == (True,) * 4
    assert (cpu.ptx, cpu.pdl, cpu.gluon, cpu.bulk) == (False,) * 4
    assert (cpu.capability, cpu.multiprocessors, cpu.shared_nbytes) == ((9, 0), 132, 227 << 10)


def test_an_unknown_name_lists_those_that_are_known():
    with pytest.raises(ValueError, match=r"'b200' is no GPU .* expected one of h100, h200, a100, rtx4090"):
        Gpu.named("b200")


@pytest.mark.gpu
def test_a_device_is_what_its_name_says(device):
    name = torch.cuda.get_device_name(device)
    if not any(known in name for known in ("H100 80GB HBM3", "H200")):
        pytest.skip(f"{name} is not described")
    gpu = Gpu.of(device)
    assert (gpu.capability, gpu.multiprocessors, gpu.shared_nbytes) == ((9, 0), 132, 227 << 10)
    assert gpu.ptx
    assert gpu.pdl
