"""stream: every tensor arrives as it was written, in file order, within the budget, or not at all."""

import gc
import os
import sys
import threading
import weakref

import pytest
import torch
from safetensors.torch import save_file

import bigq.stream
from bigq import CheckpointError
from bigq.checkpoint import Checkpoint
from bigq.model_tensors import ModelTensors
from bigq.stream import stream

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda:0")] if torch.cuda.is_available() else [])]


BUDGET = Budget(threads=3, nbytes=8 << 20)
SMALL = Budget(threads=3, nbytes=8 * 4099)  # chunks that end inside elements and tensors, and runs of a few of them


def targets(checkpoint, device, names=None, *, own=False):
    """Every tensor to `device`, lent or in memory of its own."""

    def memory(info):
        return lambda: torch.empty(info.shape, dtype=info.dtype, device=device)

    infos = checkpoint.tensors
    return {n: Target(device=device, own=memory(infos[n]) if own else None) for n in names or infos}


def arrivals(checkpoint, wanted, budget=BUDGET, **kwargs):
    """{name: tensor} put together from its pieces, copied while they are lent."""
    arrived = {}
    for pieces in stream(checkpoint, wanted, budget, Stages(), **kwargs):
        for info, start, tensor, _ in pieces:
            assert tensor.is_contiguous()
            assert start == (len(arrived[info.name]) if info.name in arrived else 0)
            arrived[info.name] = (
                torch.cat([*([arrived[info.name]] if start else []), tensor.cpu()]) if start else tensor.cpu().clone()
            )
    return arrived


@pytest.fixture
def tensors():
    return {
        "big": torch.randn(300, 1000),
        "half": torch.randn(70, 33).half(),
        "bytes": torch.randint(0, 256, (5001,), dtype=torch.uint8),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 7),
        "flags": torch.tensor([True, False, True]),
        "wide": torch.randn(9, 9).bfloat16(),
    }


@pytest.fixture
def checkpoint(tensors, tmp_path):
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:4]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[4:]}, tmp_path / "model-00002-of-00002.safetensors")
    return Checkpoint.open(tmp_path)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks that end inside elements and tensors, and a budget of a few of them."""
    monkeypatch.setattr(bigq.stream, "_CHUNK_NBYTES", 4099)
    monkeypatch.setattr(bigq.stream, "_BUDGET_NBYTES", 3 * 4099)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_arrives_as_written_in_file_order(checkpoint, tensors, device):
    names = []
    for name, tensor, owned in stream(checkpoint, list(tensors)[::-1], on(device)):
        assert owned
        assert tensor.device == device
        assert torch.equal(tensor.cpu(), tensors[name])
        assert (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape)
        names.append(name)
    assert names == list(checkpoint.tensors)


def test_a_selection(checkpoint, tensors):
    got = {name: tensor for name, tensor, _ in stream(checkpoint, ["wide", "bytes"], on(CPU))}
    assert list(got) == ["bytes", "wide"]
    assert torch.equal(got["bytes"], tensors["bytes"])
    assert not list(stream(checkpoint, [], on(CPU)))


def test_pickles_and_models_come_as_views(tensors, tmp_path):
    torch.save(tensors, tmp_path / "weights.pt")
    for name, tensor, owned in stream(Checkpoint.open(tmp_path / "weights.pt"), tensors, on(CPU)):
        assert not owned
        assert torch.equal(tensor, tensors[name])
    model = torch.nn.Linear(3, 3)
    for name, tensor, owned in stream(ModelTensors(model), ["weight"], on(CPU)):
        assert (name, owned) == ("weight", False)
        assert tensor.data_ptr() == model.weight.data_ptr()


@pytest.mark.usefixtures("small_chunks")
def test_no_more_on_its_way_than_the_budget(tmp_path, monkeypatch):
    save_file({f"{i:03}": torch.full((1000,), float(i)) for i in range(40)}, tmp_path / "model.safetensors")
    alive = weakref.WeakSet()
    original = torch.empty

    def counting(*args, **kwargs):
        tensor = original(*args, **kwargs)
        alive.add(tensor)
        return tensor

    monkeypatch.setattr(torch, "empty", counting)
    most = 0
    for name, tensor, _ in stream(Checkpoint.open(tmp_path), [f"{i:03}" for i in range(40)], on(CPU)):
        assert torch.equal(tensor, torch.full((1000,), float(int(name))))
        most = max(most, len(alive))
        del tensor
    assert most <= 3 + 2  # a budget of three, the consumer's, and one that a thread is done with


def truncate(checkpoint, tmp_path):
    os.truncate(checkpoint.files[0], 9000)


def remove(checkpoint, tmp_path):
    checkpoint.files[1].unlink()


def grow(checkpoint, tmp_path):
    with checkpoint.files[0].open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize(
    "damage, words", [(truncate, "changed after"), (remove, "cannot open"), (grow, "changed after")]
)
def test_damage_before_reading(checkpoint, tensors, tmp_path, damage, words):
    damage(checkpoint, tmp_path)
    with pytest.raises(CheckpointError, match=words):
        list(stream(checkpoint, tensors, on(CPU)))


@pytest.mark.usefixtures("small_chunks")
def test_a_file_cut_short_while_it_is_read(checkpoint, tensors):
    reading = stream(checkpoint, tensors, on(CPU))
    next(reading)
    for file in checkpoint.files:
        os.truncate(file, 400)
    with pytest.raises(CheckpointError, match=r"ended at byte \d+, in the middle of tensor|changed after"):
        list(reading)


@pytest.mark.parametrize("end", ["error", "abandoned", "interrupt"])
@pytest.mark.usefixtures("small_chunks")
def test_threads_and_files_end_with_it(checkpoint, tensors, monkeypatch, end):
    before = threading.active_count()
    files = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    reading = stream(checkpoint, tensors, on(CPU))
    next(reading)
    if end == "error":

        def broken(*args):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(CheckpointError, match=r"cannot read tensor .*Input/output error"):
            list(reading)
    elif end == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            reading.throw(KeyboardInterrupt)
    del reading
    gc.collect()
    assert threading.active_count() == before
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) <= files
