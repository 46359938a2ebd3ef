"""Fixtures of offloading: a stack of layers that is offloaded, beside one that is not."""

import copy

import pytest
from torch import nn

from bigq.offload import in_place, transfer
from bigq.ops import eager
from offloaded_stack import DEVICES, Stack, offload


@pytest.fixture(params=[*DEVICES, pytest.param("cuda-pinned", marks=pytest.mark.gpu)])
def pair(request, tmp_path):
    """(a model whose layers are offloaded, the same model resident, their device)."""
    device, _, pinned = request.param.partition("-")
    plain = Stack()
    model = copy.deepcopy(plain)
    offload(model, tmp_path, device, "cpu" if pinned else "disk")
    plain.to(device).requires_grad_(False)
    yield model, plain, device
    assert all(t.device.type == "cpu" for t in model.state_dict().values()), "given back"
    assert not any(layer._hf_hook.block.calls for layer in model.layers)


@pytest.fixture
def views_of_files(monkeypatch):
    """On a CPU: what is in a file stands for pinned memory, and the CPU for the GPU that reads it."""
    made = []

    def view(tensor, device):
        made.append(tensor)
        return nn.Parameter(tensor.detach(), requires_grad=False)

    monkeypatch.setattr(in_place, "view_on", view)
    return made


@pytest.fixture
def copied(monkeypatch):
    """The bytes of each copy."""
    nbytes = []
    start = transfer.Transfer.start

    def counted(self, layout, buffer, stream):
        nbytes.append(sum(tensor.nbytes for tensor in layout.tensors))
        return start(self, layout, buffer, stream)

    monkeypatch.setattr(transfer.Transfer, "start", counted)
    return nbytes


@pytest.fixture
def made(monkeypatch):
    """The number of experts that each call of a layer with a cache copied."""
    counts = []
    call_op = eager.call_op

    def counted(name, *args):
        if name == "fill_slots":
            counts.append(int((args[0][:, 0] >= 0).sum()))
        return call_op(name, *args)

    monkeypatch.setattr(eager, "call_op", counted)
    return counts
