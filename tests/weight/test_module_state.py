"""The state of quantized modules: whole or refused, put back by functional_call, and freed with the model."""

import gc
import weakref

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from bigq import FP4, NF4, BigqError, QuantizationConfig, load_and_quantize_model
from bigq.formats import decode_quant_state
from bigq.weight.linear import QuantizedLinear
from one_weight import near, quantized


def test_functional_call_with_a_float_weight_leaves_the_module_as_it_was():
    layer, x = quantized(nn.Linear(71, 7)), torch.ones(2, 71)
    before = layer.dequantize()
    out = torch.func.functional_call(layer, {"weight": torch.ones(7, 71), "bias": torch.zeros(7)}, (x,))
    assert out[0, 0] == 71
    assert torch.equal(layer.dequantize(), before)


def test_an_extra_weight_tied_to_an_earlier_module_keeps_the_quant_state():
    class Extra(nn.Linear):
        pass

    model = nn.ModuleDict({"embed": nn.Embedding(50, 32), "last": Extra(32, 9)})
    model["last"].table = model["embed"].weight
    model = load_and_quantize_model(model, None, QuantizationConfig(NF4(), also_quantize=["embed", "last"]), "cpu")
    for module in model.values():
        assert decode_quant_state(module.quant_state, "quant_state") == module.descriptions


@pytest.mark.parametrize("name", ["weight_packed", "weight_absmax", "quant_state"])
@pytest.mark.parametrize("kind", ["parameter", "buffer", "attribute"])
def test_a_name_in_use_is_refused_and_nothing_is_taken(kind, name):
    module = nn.Linear(71, 7)
    if kind == "buffer":
        module.register_buffer(name, torch.ones(3))
    else:
        setattr(module, name, nn.Parameter(torch.ones(3)) if kind == "parameter" else {})
    model = nn.ModuleDict({"layer": module})
    with pytest.raises(BigqError, match=name):  # a tensor quant_state is refused as one that describes nothing
        quantized(model)
    assert type(module) is nn.Linear


def test_the_saved_state_of_a_cast_module_brings_its_dtype():
    module, other = quantized(nn.Linear(71, 7)).half(), quantized(nn.Linear(71, 7))
    other.load_state_dict(module.state_dict(), assign=True)
    assert other.weight.dtype == other.bias.dtype == torch.float16
    module.load_state_dict(module.state_dict())
    assert module.weight.dtype == torch.float16


def test_a_state_without_the_duplicates_of_tied_tensors_is_taken(tmp_path):
    def tied():
        model = nn.ModuleDict({"embed": nn.Embedding(50, 71), "head": nn.Linear(71, 50, bias=False)})
        model["head"].weight = model["embed"].weight
        return load_and_quantize_model(model, None, QuantizationConfig(NF4(), also_quantize=["embed"]), "cpu")

    model, other = tied(), tied()
    save_model(model, str(tmp_path / "model.safetensors"))
    load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other["head"].weight.dequantize(), model["head"].weight.dequantize())
    assert other["head"].weight_packed is other["embed"].weight_packed


def test_a_copy_of_a_weight_that_is_assigned_is_not_tied_to_it():
    first, second = quantized(nn.Linear(71, 7)), quantized(nn.Linear(71, 7))
    second.weight = first.weight.half()
    before = second.weight.dequantize()
    first.weight.zero_()
    assert torch.equal(second.weight.dequantize(), before)
    assert before.any()


def test_a_linear_on_meta_takes_float_weights_that_are_assigned():
    module = QuantizedLinear(quantized(nn.Linear(71, 7)).description, bias=torch.float32)
    weight = torch.randn(7, 71)
    module.load_state_dict({"weight": weight, "bias": torch.zeros(7)}, assign=True)
    assert near(module.weight.dequantize(), weight)


def test_a_state_dict_of_another_width_is_refused_also_where_its_tensors_have_the_same_shapes():
    module, other = quantized(nn.Linear(71, 8)), quantized(nn.Linear(72, 8))
    with pytest.raises(RuntimeError, match="shape"):
        module.load_state_dict(other.state_dict())
    assert (module.in_features, module.weight.shape[1]) == (71, 71)


def test_a_state_dict_of_a_weight_held_the_other_way_round_is_refused():
    linear, conv1d = quantized(nn.Linear(9, 9)), quantized(Conv1D(9, 9))
    with pytest.raises(RuntimeError, match=r"transposed|shape"):
        conv1d.load_state_dict(linear.state_dict())


@pytest.mark.parametrize("dropped", ["weight_packed", "weight_absmax"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lax"])
def test_a_part_of_a_weight_without_the_others_is_refused_and_nothing_is_taken(strict, dropped):
    module, state = quantized(nn.Linear(71, 7)), dict(quantized(nn.Linear(71, 7)).state_dict())
    del state[dropped]
    before = module.dequantize()
    with pytest.raises(RuntimeError):
        module.load_state_dict(state, strict=strict)
    assert torch.equal(module.dequantize(), before)


def test_a_quant_state_alone_does_not_turn_fp4_codes_into_nf4():
    module, other = quantized(nn.Linear(71, 7), FP4()), quantized(nn.Linear(71, 7), NF4())
    before = module.dequantize()
    with pytest.raises(RuntimeError, match="a part of the quantized weight and no weight_packed"):
        module.load_state_dict({"quant_state": other.quant_state}, strict=False)
    assert torch.equal(module.dequantize(), before)


def test_a_float_weight_that_is_assigned_brings_its_dtype():
    """As `load_state_dict(assign=True)` of a plain module; the bias beside it does become bfloat16."""
    module = quantized(nn.Linear(71, 7))
    state = {"weight": torch.zeros(7, 71, dtype=torch.bfloat16), "bias": torch.zeros(7, dtype=torch.bfloat16)}
    module.load_state_dict(state, assign=True)
    assert module.weight.dtype == module.bias.dtype == torch.bfloat16


def test_a_deleted_model_is_freed_without_the_collector():
    gc.disable()
    try:
        model = quantized(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
        alive = weakref.ref(model[0].weight_packed)
        del model
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_takes_a_nested_tensor():
    """The plain one does, in its fast path."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2).eval()
    quantized(encoder)
    sequences = [torch.randn(3, 16), torch.randn(5, 16)]
    with torch.no_grad():
        out = encoder(torch.nested.nested_tensor(sequences, layout=torch.strided))
        for found, sequence in zip(out.unbind(), sequences, strict=True):
            torch.testing.assert_close(found, encoder(sequence[None])[0], rtol=1e-4, atol=1e-5)


def test_a_conv1d_says_its_format():
    assert "format=nf4" in repr(quantized(Conv1D(9, 71)))
