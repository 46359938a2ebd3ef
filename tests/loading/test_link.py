"""StagingBuffer: pinned memory that is not written again, nor freed, before its copy is done."""

from types import SimpleNamespace

import pytest
import torch

from bigq import PlacementError
from bigq.loading.link import StagingBuffer
from bigq.system.pinned_memory import PinnedMemory


class Event:
    """Notes what is asked of an event of CUDA's."""

    def __init__(self):
        self.asked = []

    def record(self, stream):
        self.asked.append(("record", stream))

    def synchronize(self):
        self.asked.append("synchronize")


@pytest.fixture
def cuda(monkeypatch):
    """A CUDA runtime that answers `status`, and the events that were made."""
    made = SimpleNamespace(status=0, events=[])
    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, nbytes, flags: made.status, cudaHostUnregister=lambda address: None
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "Event", lambda: made.events.append(Event()) or made.events[-1])
    return made


class ToGPU:
    """A Link without a GPU."""

    def __init__(self, stream):
        self.stream = stream


def test_it_is_free_when_the_last_copy_is_done(cuda):
    buffer = StagingBuffer(8)
    buffer.wait()  # for nothing
    buffer.bytes[:] = bytes(range(8))
    first, other = ToGPU("first"), ToGPU("other")
    for target, nbytes in ((first, 8), (other, 3), (first, 5)):
        memory = torch.zeros(nbytes, dtype=torch.uint8)
        buffer.copy_to(memory, target)
        assert memory.tolist() == list(range(nbytes))
    buffer.wait()
    assert [event.asked for event in cuda.events] == [
        [("record", "first"), ("record", "first"), "synchronize"],
        [("record", "other")],
    ]


def test_nothing_is_copied_that_could_not_be_waited_for(cuda, monkeypatch):
    buffer, memory = StagingBuffer(4), torch.full((4,), 7, dtype=torch.uint8)

    def fails():
        raise RuntimeError("no event")

    monkeypatch.setattr(torch.cuda, "Event", fails)
    with pytest.raises(RuntimeError, match="no event"):
        buffer.copy_to(memory, ToGPU("first"))
    assert memory.tolist() == [7] * 4


def test_memory_that_cannot_be_pinned_is_an_error(cuda):
    cuda.status = 2
    with pytest.raises(PlacementError, match=r"cannot pin 16\.8 MB .*CUDA error 2.*lower read_budget"):
        StagingBuffer(16 << 20)


def test_memory_that_the_system_does_not_have_is_an_error(cuda, monkeypatch):
    def fails(nbytes):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(PinnedMemory, "of", fails)
    with pytest.raises(PlacementError, match=r"16\.8 MB .*Cannot allocate memory.*lower read_budget"):
        StagingBuffer(16 << 20)
