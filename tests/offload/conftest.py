"""Fixtures of offloading: a stack of layers that is offloaded, beside one that is not."""

import copy

import pytest

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
