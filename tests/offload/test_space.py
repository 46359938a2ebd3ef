"""OffloadSpace: reserved, mapped, unnamed or pinned, freed."""

import gc
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bigq import CheckpointError, PlacementError
from bigq.formats import TensorSpec
from bigq.offload.space import CheckpointMap, OffloadSpace, PinnedMap, is_file_backed, mapping_of

SPECS = {
    "b.weight": TensorSpec(shape=(3, 5), dtype=torch.float32),
    "a.weight": TensorSpec(shape=(7,), dtype=torch.int8),
    "b.scale": TensorSpec(shape=(), dtype=torch.bfloat16),
    "a.nothing": TensorSpec(shape=(0, 4), dtype=torch.float16),
    "a.flags": TensorSpec(shape=(2, 2), dtype=torch.bool),
}


def mapped_files():
    maps = Path("/proc/self/maps")
    return [line for line in maps.read_text().splitlines() if "bigq-" in line or ("(deleted)" in line and "/#" in line)]


def test_tensors_keep_what_they_are_given(tmp_path):
    file = OffloadSpace.in_file(tmp_path / "new" / "folder", SPECS)
    tensors = [file.empty(name) for name in SPECS]
    values = [torch.randint(0, 2, spec.shape).to(spec.dtype) for spec in SPECS.values()]
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
    for tensor, value, spec in zip(tensors, values, SPECS.values(), strict=True):
        assert torch.equal(tensor, value)
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype)
        assert is_file_backed(tensor) == bool(tensor.numel())
        assert tensor.data_ptr() % 256 == 0 or not tensor.numel()


def test_every_tensor_owns_its_storage(tmp_path):
    file = OffloadSpace.in_file(tmp_path, SPECS)
    tensors = [file.empty(name) for name in SPECS]
    storages = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors if t.numel()}
    assert len(storages) == 4
    assert all(
        t.untyped_storage().nbytes() == spec.nbytes
        for t, spec in zip(tensors, SPECS.values(), strict=True)
        if t.numel()
    )


def test_nothing_is_left_in_the_folder(tmp_path):
    file = OffloadSpace.in_file(tmp_path, SPECS)
    tensor = file.empty("b.weight")
    assert os.listdir(tmp_path) == []
    del file
    tensor.fill_(2.0)
    assert tensor.sum() == 30


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_the_last_tensor_frees_the_file(tmp_path):
    gc.collect()  # models of other tests
    before = len(mapped_files())
    file = OffloadSpace.in_file(tmp_path, SPECS)
    tensors = [file.empty(name) for name in SPECS]
    assert len(mapped_files()) > before
    del file, tensors
    gc.collect()
    assert len(mapped_files()) == before


def test_other_tensors_are_not_file_backed():
    assert not is_file_backed(torch.ones(4))
    assert not is_file_backed(torch.ones(4, device="meta"))


def test_a_full_disk_is_a_clear_error(tmp_path, monkeypatch):
    def full(descriptor, offset, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(PlacementError, match=r"cannot reserve 0\.000 GB: .*No space left.*free some space"):
        OffloadSpace.in_file(tmp_path, SPECS)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(PlacementError, match="taken"):
        OffloadSpace.in_file(tmp_path / "taken", SPECS)


def test_the_tensors_of_a_module_are_neighbours(tmp_path):
    file = OffloadSpace.in_file(tmp_path, SPECS)
    places = sorted((mapping_of(file.empty(name))[1], name) for name in SPECS if name != "a.nothing")
    assert places == [(0, "a.flags"), (256, "a.weight"), (512, "b.scale"), (768, "b.weight")]


class TestCheckpointMap:
    @pytest.fixture
    def file(self, tmp_path):
        path = tmp_path / "file"
        path.write_bytes(bytes(range(100)))
        return path

    def test_tensors_rest_in_the_file(self, file):
        tensor = CheckpointMap.open(file, 100).tensor(8, TensorSpec(shape=(2, 3), dtype=torch.uint8))
        assert tensor.tolist() == [[8, 9, 10], [11, 12, 13]]
        assert is_file_backed(tensor)

    def test_an_edit_does_not_reach_the_file(self, file):
        tensor = CheckpointMap.open(file, 100).tensor(0, TensorSpec(shape=(100,), dtype=torch.uint8))
        tensor.zero_()
        assert not tensor.any()
        assert file.read_bytes() == bytes(range(100))

    def test_a_file_of_another_size_is_refused(self, file):
        with pytest.raises(CheckpointError, match="had 99 bytes and now has 100"):
            CheckpointMap.open(file, 99)

    def test_a_file_cut_short_is_an_error_that_names_it(self, file):
        tensor = CheckpointMap.open(file, 100).tensor(90, TensorSpec(shape=(10,), dtype=torch.uint8))
        mapping, offset = mapping_of(tensor)
        os.truncate(file, 95)
        with pytest.raises(CheckpointError, match=rf"{file} ended at byte 95.*cut short"):
            mapping.read(offset, torch.zeros(10, dtype=torch.uint8))


@pytest.mark.gpu
def test_pinned_space_is_pinned_and_given_back():
    space = OffloadSpace.pinned(SPECS)
    tensors = [space.empty(name) for name in SPECS]
    assert all(tensor.is_pinned() for tensor in tensors if tensor.numel())
    assert not any(is_file_backed(tensor) for tensor in tensors)
    tensors[0].fill_(2.0)
    assert tensors[0].cuda(non_blocking=True).sum() == 30
    del space, tensors
    gc.collect()
    torch.cuda.synchronize()
    again = OffloadSpace.pinned(SPECS).empty("b.weight")
    assert again.is_pinned()
    assert torch.empty(8).is_pinned() is False


def test_pinned_memory_is_given_back_when_no_gpu_reads_it(monkeypatch):
    """Three GPUs: the second has memory, so copies or kernels of it may run, and the third has none."""
    events = []
    for name, value in {"device_count": 3, "current_device": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_reserved", [0, 512, 0].__getitem__)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append(f"wait for {device}"))
    mapping = PinnedMap(-1, 4096)
    mapping._address = 4096
    mapping._cudart = SimpleNamespace(cudaHostUnregister=lambda address: events.append("give back"))
    del mapping
    gc.collect()
    assert events == ["wait for 0", "wait for 1", "give back"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # nothing that `__del__` raises gets out
@pytest.mark.parametrize("where", ["waiting", "unpinning"])
def test_an_interrupt_does_not_unmap_memory_that_a_gpu_may_read(monkeypatch, where):
    """Python raises it as CUDA returns; what is unmapped as pinned would be read from the old pages later."""
    events = []

    def done(event):
        events.append(event)
        if where == event and events.count(event) == 1:
            raise KeyboardInterrupt

    for name, value in {"device_count": 1, "current_device": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done("waiting"))
    mapping = PinnedMap(-1, 4096)
    mapping._address = 4096
    mapping._cudart = SimpleNamespace(cudaHostUnregister=lambda address: done("unpinning"))
    del mapping
    gc.collect()
    assert events == {"waiting": ["waiting", "waiting", "unpinning"], "unpinning": ["waiting", "unpinning"]}[where]
