"""Placeholders: in the state of a model, in its files, and gone where the model is no quantized one any more."""

import copy
import pickle

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

import bigq
from bigq import QuantizationConfig, QuantizedModule, load_and_quantize_model
from bigq.model.placeholders import drop_placeholders, hold_placeholders
from bigq.system.internals import state_hooks
from bigq.weight.placeholder import is_placeholder

NAMES = [f"blocks.{index}.{leaf}.weight" for index in range(3) for leaf in ("up", "down")]


@pytest.fixture
def model(tiny):
    model = load_and_quantize_model(tiny(), None, QuantizationConfig("nf4"), "cpu")
    hold_placeholders(model)
    return model


def placeholders(state):
    return [name for name, tensor in state.items() if is_placeholder(tensor)]


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_state_ends_with_one_for_each_quantized_weight(model):
    state = model.state_dict()
    assert list(state)[-6:] == placeholders(state) == NAMES
    assert placeholders(nn.Sequential(model).state_dict()) == [f"0.{name}" for name in NAMES]


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_loads_into_the_same_model(model, assign):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not model.load_state_dict(state, assign=assign).missing_keys
    assert_same(model.state_dict(), state)


def test_a_state_without_them_loads_and_one_of_them_alone_does_not(model):
    state = model.state_dict()
    model.load_state_dict({name: tensor for name, tensor in state.items() if name not in NAMES})
    with pytest.raises(RuntimeError, match=r'Missing key.*"blocks.0.up.weight_packed"'):
        model.load_state_dict({name: state[name] for name in NAMES})


def test_a_model_of_floats_refuses_them(model, tiny):
    with pytest.raises(RuntimeError, match=r"size mismatch for blocks.0.up.weight: .* torch.Size\(\[0\]\)"):
        tiny().load_state_dict(model.state_dict(), strict=False)


@pytest.mark.parametrize("settings", [{}, {"max_shard_size": "20KB"}, {"safe_serialization": False}], ids=str)
def test_accelerate_saves_each_and_says_nothing_of_shared_memory(model, empty, tiny, tmp_path, caplog, settings):
    Accelerator().save_model(model, tmp_path, **settings)
    assert not [record for record in caplog.records if "shared" in record.message]
    files = [*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")]
    assert (len(files) > 2) == ("max_shard_size" in settings)
    load = torch.load if files[0].suffix == ".bin" else load_file
    saved = {name: tensor for file in files for name, tensor in load(file).items()}
    assert_same(saved, model.state_dict())
    again = load_and_quantize_model(empty(tiny), tmp_path, device_map="cpu", progress=False)
    hold_placeholders(again)
    assert_same(again.state_dict(), saved)


def test_a_tensor_of_the_models_own_is_none(tmp_path):
    def build():
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
        model.register_buffer("weight_packed", torch.empty(0, dtype=torch.uint8))
        return model

    model = load_and_quantize_model(build(), None, QuantizationConfig("nf4"), "cpu")
    hold_placeholders(model)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    again = load_and_quantize_model(build(), tmp_path, device_map="cpu", progress=False)
    assert again.state_dict().keys() == model.state_dict().keys() - {"0.weight"}


def test_there_is_one_hook_also_on_copies(model):
    for held in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        hold_placeholders(held)
        assert len(state_hooks(held)[1]) == 1
        drop_placeholders(held)
        assert not state_hooks(held)[1]


def test_a_load_that_fails_leaves_none(tiny, monkeypatch):
    model = tiny()

    def fail(known, config):
        hold_placeholders(known)
        raise RuntimeError("an error in the last step")

    monkeypatch.setattr(bigq.load_source, "introduce", fail)
    with pytest.raises(RuntimeError, match="last step"):
        load_and_quantize_model(model, None, QuantizationConfig("nf4"), "cpu")
    assert not state_hooks(model)[1]


def test_a_dequantized_model_has_none(model):
    plain = bigq.dequantize(model)
    assert not any(isinstance(module, QuantizedModule) for module in plain.modules())
    assert not placeholders(plain.state_dict())
    assert not state_hooks(plain)[1]
