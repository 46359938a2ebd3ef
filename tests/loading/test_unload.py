"""unloaded: loading again replaces what a model holds, or leaves it as it was."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bigq.load_source
from bigq import CheckpointError, QuantizationConfig, QuantizedLinear, load_and_quantize_model, materialize
from bigq.weight.quantized_module import QuantizedModule

CONFIGS = {
    "nf4": QuantizationConfig("nf4"),
    "int8, and more of it": QuantizationConfig("int8", also_quantize=["embed"]),
    "less, and in float32": QuantizationConfig(
        "nf4", dtype="bf16", cast_buffers=True, skip_modules=["blocks.1"], keep_in_fp32_modules=["blocks.0"]
    ),
}
MAPS = {"resident": "cpu", "on disk": {"": "cpu", "blocks": "disk"}}


@pytest.fixture
def other(tiny, tmp_path):
    """Another checkpoint for the same model."""
    torch.manual_seed(9)
    save_file(tiny().state_dict(), tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


def assert_same(model, expected, ids):
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in expected.named_modules()]
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in expected.modules()]
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
        assert tensor.dtype == expected.state_dict()[name].dtype, name
    assert torch.equal(model(ids), expected(ids))


def load(model, weights, config, device_map, tmp_path):
    return load_and_quantize_model(
        model, weights, config, device_map, offload="quantized", offload_folder=tmp_path / "off"
    )


@pytest.mark.parametrize("second_map", MAPS.values(), ids=MAPS.keys())
@pytest.mark.parametrize("second", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("first_map", MAPS.values(), ids=MAPS.keys())
@pytest.mark.parametrize("first", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_second_load_is_that_of_a_new_skeleton(
    tiny, checkpoint, empty, ids, other, tmp_path, first, first_map, second, second_map
):
    model = load(empty(tiny), checkpoint, first, first_map, tmp_path)
    model(ids)
    assert load(model, other, second, second_map, tmp_path) is model
    assert_same(model, load(empty(tiny), other, second, second_map, tmp_path), ids)


def test_a_quantized_checkpoint_replaces_too(tiny, checkpoint, empty, ids, other, tmp_path):
    quantized = load(empty(tiny), other, CONFIGS["nf4"], "cpu", tmp_path)
    save_file(quantized.state_dict(), tmp_path / "quantized.safetensors")
    model = load(empty(tiny), checkpoint, CONFIGS["int8, and more of it"], "cpu", tmp_path)
    load(model, tmp_path / "quantized.safetensors", None, "cpu", tmp_path)
    assert_same(model, quantized, ids)


def test_one_that_was_materialized(tiny, checkpoint, empty, ids, other, tmp_path):
    model = materialize(load(empty(tiny), checkpoint, CONFIGS["nf4"], MAPS["on disk"], tmp_path))
    load(model, other, CONFIGS["nf4"], "cpu", tmp_path)
    assert_same(model, load(empty(tiny), other, CONFIGS["nf4"], "cpu", tmp_path), ids)


def test_ties_stay(tiny, empty, ids, tmp_path):
    save_file({n: t for n, t in tiny(tied=True).state_dict().items() if n != "head.weight"}, tmp_path / "m.safetensors")
    embedded = QuantizationConfig("nf4", also_quantize=["embed"])
    model = load(empty(tiny, tied=True), tmp_path / "m.safetensors", embedded, "cpu", tmp_path)
    for config in (embedded, CONFIGS["nf4"]):
        load(model, tmp_path / "m.safetensors", config, "cpu", tmp_path)
        assert_same(model, load(empty(tiny, tied=True), tmp_path / "m.safetensors", config, "cpu", tmp_path), ids)
    assert model.head.weight is model.embed.weight


def test_a_class_that_was_made_for_a_module_goes(empty, tmp_path):
    class Bilinear(nn.Bilinear):
        pass

    def build():
        return nn.ModuleDict({"both": Bilinear(8, 8, 4), "head": nn.Linear(4, 4), "last": nn.Linear(4, 4)})

    save_file(build().state_dict(), tmp_path / "m.safetensors")
    config = QuantizationConfig("nf4", also_quantize=["both"])
    model = load(empty(build), tmp_path / "m.safetensors", config, "cpu", tmp_path)
    assert isinstance(model["both"], QuantizedModule)
    load(model, tmp_path / "m.safetensors", CONFIGS["nf4"], "cpu", tmp_path)
    assert type(model["both"]) is Bilinear
    assert "_quantized" not in vars(model["both"])
    assert isinstance(model["head"], QuantizedLinear)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS.keys())
def test_a_load_that_fails_leaves_the_model_as_it_was(
    tiny, checkpoint, empty, ids, other, tmp_path, monkeypatch, device_map, error
):
    model = load(empty(tiny), checkpoint, CONFIGS["nf4"], device_map, tmp_path)
    expected, classes = model(ids), [type(module) for module in model.modules()]
    attributes = [dict(vars(module)) for module in model.modules()]
    state = {name: id(tensor) for name, tensor in model.named_parameters()}

    def fail(*args, **kwargs):
        raise error("on purpose")

    monkeypatch.setattr(bigq.load_source, "make_report", fail)
    with pytest.raises(error, match="on purpose"):
        load(model, other, CONFIGS["int8, and more of it"], "cpu", tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        load(model, tmp_path / "x.safetensors", CONFIGS["nf4"], "cpu", tmp_path)
    assert [type(module) for module in model.modules()] == classes
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == state
    assert torch.equal(model(ids), expected)
