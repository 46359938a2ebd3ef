"""FaultyBytes and with_bytes: each fault comes where it was asked for, and nothing else changes."""

import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bigq import CheckpointError
from bigq.checkpoint import Checkpoint, LocalFile, ReadError
from bigq.model.in_place import ModelTensors
from bigq.testing import FaultyBytes, with_bytes

CONTENT = bytes(range(200))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    file = LocalFile(path, 200)
    yield file
    file.close()


@pytest.fixture
def tensors():
    return {name: torch.randn(5, 7) for name in "abc"}


@pytest.fixture
def checkpoint(tensors, tmp_path):
    save_file({"a": tensors["a"], "b": tensors["b"]}, tmp_path / "1.safetensors")
    save_file({"c": tensors["c"]}, tmp_path / "2.safetensors")
    return Checkpoint.open(tmp_path)


def read(source, offset, nbytes):
    buffer = bytearray(nbytes)
    source.read_into(memoryview(buffer), offset)
    return bytes(buffer)


def test_without_faults_it_gives_what_it_wraps_but_no_path(file):
    faulty = FaultyBytes(file)
    assert (faulty.name, faulty.nbytes, faulty.path) == (file.name, 200, None)
    assert read(faulty, 10, 50) == CONTENT[10:60]
    assert read(faulty, 0, 200) == CONTENT
    assert faulty.reads == [range(10, 60), range(200)]
    assert faulty.closes == 0
    faulty.close()
    assert faulty.closes == 1
    assert read(faulty, 5, 1) == CONTENT[5:6]


def test_a_read_of_the_byte_fails_and_those_beside_it_do_not(file):
    error = TimeoutError("no answer")
    given, by_default = FaultyBytes(file, fail_at=100, error=error), FaultyBytes(file, fail_at=100)
    for faulty, expected in ((given, TimeoutError), (by_default, ReadError)):
        assert read(faulty, 50, 50) == CONTENT[50:100]
        assert read(faulty, 101, 99) == CONTENT[101:]
        for offset, nbytes in ((100, 1), (50, 51), (0, 200)):
            buffer = bytearray(nbytes)
            with pytest.raises(expected) as caught:
                faulty.read_into(memoryview(buffer), offset)
            assert not any(buffer)
            assert caught.value is error or caught.value.at == 100


def test_bytes_that_end_early_give_what_there_is_and_say_where(file):
    faulty = FaultyBytes(file, short_after=100)
    assert read(faulty, 40, 60) == CONTENT[40:100]
    for offset, at in ((90, 100), (100, 100), (150, 150)):
        buffer = bytearray(30)
        with pytest.raises(ReadError, match=rf"file ended at byte {at}: it was cut short") as caught:
            faulty.read_into(memoryview(buffer), offset)
        assert caught.value.at == at
        assert buffer == CONTENT[offset:at].ljust(30, b"\0")


def test_one_byte_is_flipped_in_every_read_that_includes_it(file):
    faulty = FaultyBytes(file, flip_at=100)
    flipped = bytes([100 ^ 0xFF])
    assert read(faulty, 90, 20) == CONTENT[90:100] + flipped + CONTENT[101:110]
    assert read(faulty, 100, 1) == flipped
    assert read(faulty, 0, 100) + read(faulty, 101, 99) == CONTENT[:100] + CONTENT[101:]


def test_reads_are_delayed_all_of_them_or_those_of_a_byte(file, monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for delay_at, expected in ((None, [0.5, 0.5]), (60, [0.5])):
        del slept[:]
        faulty = FaultyBytes(file, delay_s=0.5, delay_at=delay_at)
        assert read(faulty, 0, 60) + read(faulty, 60, 140) == CONTENT
        assert slept == expected


@pytest.mark.parametrize(
    "faults, message",
    [
        ({"fail_at": 200}, "fail_at is 200, but .*file has 200 bytes"),
        ({"short_after": -1}, "short_after is -1"),
        ({"flip_at": 1 << 40}, "flip_at is"),
        ({"delay_s": 1.0, "delay_at": 200}, "delay_at is 200"),
        ({"error": OSError()}, "error is given without fail_at"),
        ({"delay_at": 5}, "delay_at is given without delay_s"),
    ],
    ids=str,
)
def test_a_fault_that_could_not_happen_is_refused(file, faults, message):
    with pytest.raises(ValueError, match=message):
        FaultyBytes(file, **faults)


def test_every_source_of_bytes_is_wrapped_once_and_the_checkpoint_is_left_alone(checkpoint, tensors):
    before = {name: stored.spans for name, stored in checkpoint.tensors.items()}
    wrapped = []

    def wrap(source):
        wrapped.append(FaultyBytes(source))
        return wrapped[-1]

    source = with_bytes(checkpoint, wrap)
    assert [faulty.name for faulty in wrapped] == list(map(str, checkpoint.files))
    assert [source.tensors[name].spans[0].source for name in "abc"] == [wrapped[0], wrapped[0], wrapped[1]]
    assert source.tensors == checkpoint.tensors
    assert {name: stored.spans for name, stored in checkpoint.tensors.items()} == before
    assert not source.in_place
    source.check()
    got = dict(source.read(["c", "a"]))
    assert list(got) == ["a", "c"]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in got.items())
    assert [len(faulty.reads) for faulty in wrapped] == [1, 1]
    assert [faulty.closes for faulty in wrapped] == [1, 1]
    with pytest.raises(CheckpointError, match="does not hold 'd'"):
        source.read(["d"])


def test_read_meets_the_faults_too(checkpoint, tensors):
    stored = checkpoint.tensors["b"].spans[0]
    failing = with_bytes(checkpoint, lambda s: FaultyBytes(s, fail_at=stored.offset) if s is stored.source else s)
    assert torch.equal(dict(failing.read(["a"]))["a"], tensors["a"])
    with pytest.raises(CheckpointError, match=r"cannot read tensor 'b' of .*1\.safetensors: a fault"):
        list(failing.read(["a", "b"]))
    flipping = with_bytes(checkpoint, lambda s: FaultyBytes(s, flip_at=stored.offset) if s is stored.source else s)
    got = dict(flipping.read("abc"))
    assert (got["b"].view(torch.uint8) != tensors["b"].view(torch.uint8)).sum() == 1
    assert all(torch.equal(got[name], tensors[name]) for name in "ac")


def test_tensors_that_lie_in_no_bytes_are_read_as_they_were(tensors, tmp_path):
    torch.save(tensors, tmp_path / "weights.pt", _use_new_zipfile_serialization=False)
    source = with_bytes(Checkpoint.open(tmp_path), FaultyBytes)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in source.read(tensors))
    model = nn.Linear(2, 3)
    in_memory = with_bytes(ModelTensors(model), FaultyBytes)
    assert in_memory.in_place
    assert dict(in_memory.read(["bias"]))["bias"].data_ptr() == model.bias.data_ptr()
    model.to("meta")
    with pytest.raises(CheckpointError, match="on meta"):
        in_memory.check()
