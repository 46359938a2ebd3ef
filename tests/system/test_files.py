"""Files: what changed is refused by name, and a read is whole or says where the file ends."""

import os

import pytest
import torch

from bigq import CheckpointError
from bigq.system.files import open_unchanged, read_into
from bigq.system.memory import memory_of


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    return path


@pytest.fixture
def descriptor(path):
    with open_unchanged(path, 200) as file:
        yield file.fileno()


def test_what_is_not_there_or_changed_is_refused(path):
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises(CheckpointError, match=r"file changed after it was opened: it had 199 bytes and now has 200"):
        open_unchanged(path, 199)
    with pytest.raises(CheckpointError, match=r"cannot open .*file\.no"):
        open_unchanged(path.with_suffix(".no"), 200)
    assert files == (len(os.listdir("/proc/self/fd")) if files else 0)


def test_reads_into_the_memory_of_a_tensor(descriptor):
    tensor = torch.zeros(3, 4, dtype=torch.int16)
    assert read_into(memory_of(tensor), descriptor, 10) == 24
    assert bytes(tensor.view(torch.uint8).flatten().tolist()) == bytes(range(10, 34))


def test_reads_on_after_a_short_read(descriptor, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: preadv(file, [buffers[0][:7]], offset))
    buffer = bytearray(100)
    assert read_into(memoryview(buffer), descriptor, 50) == 100
    assert buffer == bytes(range(50, 150))


def test_says_how_much_came_before_the_end(descriptor):
    buffer = bytearray(100)
    assert read_into(memoryview(buffer), descriptor, 160) == 40
    assert buffer == bytes(range(160, 200)) + bytes(60)
