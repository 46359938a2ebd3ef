"""A module's extra state arrives by its set_extra_state, as load_state_dict brings it."""

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn

from bigq import BigqError, CheckpointError, QuantizedLinear, load_and_quantize_model


class Scaled(nn.Linear):
    """A linear with a number of its own that is neither Parameter nor buffer."""

    def __init__(self, state):
        super().__init__(8, 8)
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        if isinstance(state, str):
            raise ValueError(state)
        self.state = state


class Net(nn.Module):
    def __init__(self, state=None, kind=Scaled):
        super().__init__()
        self.a, self.b, self.head = kind(state) if kind is Scaled else nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)


def load(path, kind=Scaled, **kwargs):
    with init_empty_weights():
        model = Net(kind=kind)
    return load_and_quantize_model(model, path, "nf4", "cpu", progress=False, **kwargs)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_tensor(tmp_path, suffix):
    state = Net(torch.tensor([2.0, 3.0])).state_dict()
    (torch.save if suffix == ".bin" else save_file)(state, tmp_path / f"m{suffix}")
    model = load(tmp_path)
    assert isinstance(model.a, QuantizedLinear)
    assert model.a.state.tolist() == [2, 3]
    (tmp_path / f"m{suffix}").write_bytes(b"")  # it is no view of the file
    assert model.a.state.tolist() == [2, 3]


@pytest.mark.parametrize("state", [{"amax": torch.tensor(2.0), "steps": [1, 2]}, 3, None], ids=["dict", "int", "None"])
def test_any_object(tmp_path, state):
    torch.save({"epoch": 1, "model": Net(state).state_dict()}, tmp_path / "m.bin")
    assert load(tmp_path).a.state == state


@pytest.mark.parametrize("state", [torch.ones(2), {"amax": 2}], ids=["tensor", "dict"])
def test_that_of_a_module_without_one_is_unexpected(tmp_path, state):
    torch.save(Net(state).state_dict(), tmp_path / "m.bin")
    with pytest.raises(CheckpointError, match=r"a\._extra_state.*(\n.*)*" if isinstance(state, dict) else "unexpected"):
        load(tmp_path, kind=nn.Linear)
    assert isinstance(load(tmp_path, kind=nn.Linear, strict=False).b, QuantizedLinear)


def test_a_checkpoint_without_one_leaves_the_models_own(tmp_path):
    save_file(Net(kind=nn.Linear).state_dict(), tmp_path / "m.safetensors")
    assert load(tmp_path).a.state is None


def test_a_module_that_refuses_its_state_leaves_the_model_as_it_was(tmp_path):
    torch.save(Net("no").state_dict(), tmp_path / "m.bin")
    with init_empty_weights():
        model = Net(state=7)
    with pytest.raises(ValueError, match="no") as info:
        load_and_quantize_model(model, tmp_path, "nf4", "cpu", progress=False)
    assert not isinstance(info.value, BigqError)
    assert type(model.a) is Scaled
    assert model.a.weight.is_meta
    assert model.a.state == 7
