"""PinnedMemory: pinned once, and unpinned with the object."""

import gc
import mmap
from types import SimpleNamespace

import pytest
import torch

from bigq.system.pinned_memory import PinnedMemory
from interrupts import interrupted_at, points_of


@pytest.fixture
def cuda(monkeypatch):
    """A CUDA runtime that writes down what it is asked; `status` is what it answers."""
    asked = SimpleNamespace(pinned=[], unpinned=[], status=0, interrupt=None)

    def register(address, nbytes, flags):
        asked.pinned.append((address, nbytes, flags))
        if asked.interrupt is not None:
            raise asked.interrupt
        return asked.status

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=asked.unpinned.append)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return asked


def test_it_is_pinned_and_unpinned_once(cuda):
    memory = PinnedMemory.of(3 << 20)
    assert memory.pin() == 0
    address = memory.bytes.data_ptr()
    assert cuda.pinned == [(address, 3 << 20, 1)]
    held = memory.bytes[5:]
    del memory
    gc.collect()
    assert not cuda.unpinned, "a tensor keeps it"
    assert not held.any()
    del held
    gc.collect()
    assert cuda.unpinned == [address]


def test_what_cuda_does_not_pin_is_not_unpinned(cuda):
    cuda.status = 2
    memory = PinnedMemory.of(4096)
    assert memory.pin() == 2
    del memory
    gc.collect()
    assert not cuda.unpinned


def test_an_interrupt_while_it_is_pinned_leaves_nothing_pinned(cuda):
    """Python raises it as CUDA returns. New memory at this address would be read from the old pages."""
    cuda.interrupt = KeyboardInterrupt()
    memory = PinnedMemory.of(4096)
    with pytest.raises(KeyboardInterrupt):
        memory.pin()
    del memory
    cuda.interrupt = None
    gc.collect()
    assert cuda.unpinned == [cuda.pinned[0][0]]


def test_an_interrupt_as_it_is_freed_leaves_nothing_pinned(cuda):
    def pinned():
        memory = PinnedMemory.of(4096)
        memory.pin()
        return memory

    points = points_of(pinned().__del__, ("system/pinned_memory", "system/interrupts"))
    inside = [
        point for point in points if point.code is not PinnedMemory.__del__.__code__ or point.position is not None
    ]
    assert inside
    for point in inside:
        memory = pinned()
        cuda.unpinned.clear()  # of the one before
        with pytest.raises(KeyboardInterrupt):
            interrupted_at(point, memory.__del__)
        assert cuda.unpinned == [memory.bytes.data_ptr()], str(point)


def test_a_system_without_huge_pages(cuda, monkeypatch):
    def madvise(self, *advice):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(PinnedMemory, "madvise", madvise, raising=False)
    assert PinnedMemory.of(4096).pin() == 0
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert len(PinnedMemory.of(4097).bytes) == 4097


@pytest.mark.gpu
def test_torch_knows_that_it_is_pinned():
    memory = PinnedMemory.of(5 << 20)
    assert not memory.bytes.is_pinned()
    torch.zeros(1, device="cuda")
    assert memory.pin() == 0
    assert memory.bytes.is_pinned()
    memory.bytes.copy_(torch.arange(5 << 20) % 251)
    assert torch.equal(memory.bytes.to("cuda", non_blocking=True).cpu(), memory.bytes)


@pytest.mark.gpu
def test_what_cuda_does_not_pin_leaves_no_error_for_the_next_kernel():
    memory = PinnedMemory.of(1 << 20)
    x = torch.ones(1, device="cuda")
    address, runtime = memory.bytes.data_ptr(), torch.cuda.cudart()
    assert int(runtime.cudaHostRegister(address, 1 << 20, 1)) == 0
    try:
        assert memory.pin() != 0, "it is pinned already"
        assert (x + 1).item() == 2
    finally:
        runtime.cudaHostUnregister(address)
