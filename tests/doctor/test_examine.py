"""examine: what it measures, and what becomes a problem with advice."""

import warnings
from dataclasses import replace

import pytest
import torch

from bigq.doctor import examine as module
from bigq.doctor import gpu, kernels
from bigq.doctor.releases import Library
from bigq.doctor.self_test import Check
from bigq.measuring.reading import Reading
from bigq_kernels.gpu import Gpu

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """A self-test of one check, and a drive that needs no file."""
    monkeypatch.setattr(module, "self_test", lambda device: (Check(what="nf4", passed=True),))
    monkeypatch.setattr(module, "disk_rate", lambda folder: Reading(value=1e9))


def test_a_machine_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "has_nvidia_driver", lambda: False)
    found = module.examine(CPU, folder=tmp_path)
    assert (found.gpu, found.switches, found.is_right) == (None, (), True)
    assert [row.way for row in found.kernels] == ["reference"]
    assert [rate.bytes_per_s for rate in found.rates] == [1e9]
    assert found.rates[0].what.startswith(f"reads from {tmp_path} (")
    assert found.usable_memory_nbytes > 0
    assert found.to_dict()["environment"]["python"]


def test_a_library_and_a_check_become_problems(monkeypatch):
    library = Library(name="triton", version="3.1", status="not tested", advice="install 3.7")
    monkeypatch.setattr(module, "examine_releases", lambda: (library, replace(library, name="peft", advice=None)))
    monkeypatch.setattr(module, "self_test", lambda device: (Check(what="nf4", passed=False, detail="it is wrong"),))
    monkeypatch.setattr(module, "has_nvidia_driver", lambda: False)
    found = module.examine(CPU)
    assert not found.is_right
    said = {problem.what: problem.advice for problem in found.problems}
    assert said["triton 3.1 is not tested"] == "install 3.7"
    assert "results are wrong here" in said["self-test: nf4: it is wrong"]
    assert len(said) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_does_not_see_is_a_problem(monkeypatch):
    monkeypatch.setattr(module, "has_nvidia_driver", lambda: True)
    assert any("sees no GPU" in problem.what for problem in module.examine(CPU).problems)


def test_settings_that_make_a_gpu_slow(monkeypatch):
    monkeypatch.setenv("BIGQ_REFERENCE", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert [problem.advice for problem in module._settings(True)] == ["unset BIGQ_REFERENCE", "unset TRITON_INTERPRET"]


def test_a_slow_link_and_memory_that_cannot_be_pinned(monkeypatch):
    problems = []
    monkeypatch.setattr(module, "link_rate", lambda device: Reading(value=3e9))
    assert [rate.bytes_per_s for rate in module._rates(torch.device("cuda"), None, problems)] == [3e9]
    assert "moves 3.0 GB/s" in problems[0].what

    def refused(device):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(module, "link_rate", refused)
    assert module._rates(torch.device("cuda"), None, problems) == ()
    assert "ulimit -l" in problems[1].advice


def test_the_driver_is_asked_of_nvidia_smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 580.95.05\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu._driver() == "580.95.05"
    program.write_text("#!/bin/sh\necho 'has failed'; exit 9\n")
    assert gpu._driver() is None


def test_the_kernels_of_a_gpu_and_why():
    rows = kernels.choices(Gpu.named("h100"))
    assert len({(row.format, row.n, row.k, row.tokens) for row in rows}) == len(rows) == 2 * 4 * 4
    one = next(row for row in rows if row.format == "nf4" and row.tokens == 1)
    assert one.way == "sliced"
    assert one.why.startswith("The table SLICED of configs.py has a row for 1 token")
    assert one.config["warps"] > 0
    assert {row.way for row in rows if row.format == "int8" and row.tokens == 16} == {"tiles"}
    assert all(row.config for row in rows if row.way != "dequantize")


@pytest.mark.parametrize(
    "change, why, advice",
    [
        ({}, "for one to some hundred tokens", None),
        ({"gluon": False, "ptx": False}, "kernels are interpreted", "unset TRITON_INTERPRET on a GPU of NVIDIA"),
        ({"gluon": False, "capability": (7, 5)}, "compute capability 7.5 is below 8.0", None),
        ({"gluon": False}, "is none of 3.6, 3.7", "install Triton of 3.6, 3.7"),
    ],
    ids=str,
)
def test_why_gluon_is_off(change, why, advice, monkeypatch):
    monkeypatch.setattr(Gpu, "of", lambda device: replace(Gpu.named("h100"), **change))
    found = gpu.gluon_switch(torch.device("cuda"))
    assert found.is_on == (not change)
    assert why in found.why
    assert found.advice is None if advice is None else found.advice.startswith(advice)


def test_why_replays_are_off(monkeypatch):
    def warns():
        warnings.warn("launches are not replayed: Triton 9.9 is not one of 3.6", stacklevel=1)
        return False

    monkeypatch.setattr("bigq_kernels.replay.can_replay", warns)
    assert gpu.replay_switch().why == "launches are not replayed: Triton 9.9 is not one of 3.6"
    monkeypatch.setattr("bigq_kernels.replay.can_replay", lambda: False)
    assert "it was tried before" in gpu.replay_switch().why
    monkeypatch.setattr("bigq_kernels.replay.can_replay", lambda: True)
    assert gpu.replay_switch().is_on


@pytest.mark.gpu
def test_a_machine_with_a_gpu():
    device = torch.device("cuda")
    found = module.examine(device)
    assert found.gpu.memory_nbytes > found.gpu.free_nbytes > 0
    assert [switch.name for switch in found.switches] == ["Gluon kernels", "replays"]
    assert found.rates[0].bytes_per_s > 1e9
    rows = kernels.examine_kernels(device)
    assert len(rows) == 2 * 4 * 4
    assert {row.way for row in rows if row.format == "nf4" and row.tokens == 1} <= {"sliced", "dp4a"}
    assert all(row.why for row in rows)
