"""bigq.dequantize: plain modules with the decoded numbers, ties, places and errors."""

import pytest
import torch
from torch import nn

import bigq
from bigq import ConfigError, QuantizationConfig, QuantizedLinear, QuantizedModule, UnsupportedError

FORMATS = {
    "nf4": QuantizationConfig("nf4", also_quantize=["0"]),
    "double": QuantizationConfig("fp4", double_quant=True, also_quantize=["0"]),
    "int8": QuantizationConfig("int8", also_quantize=["0"]),
}


class Own(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x * 2, self.weight, self.bias)


def build(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 64), nn.Linear(64, 48), Own(48, 40), nn.Linear(40, 8))
    return model.to(dtype).eval()


def run(model):
    with torch.no_grad():
        return model(torch.arange(16))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_the_decoded_ones(name, dtype):
    model = bigq.load_and_quantize_model(build(dtype), None, FORMATS[name], "cpu")
    expected = {path: m.weight.dequantize() for path, m in model.named_modules() if isinstance(m, QuantizedModule)}
    assert set(expected) == {"0", "1", "2"}
    assert bigq.dequantize(model) is model
    assert [type(module) for module in model] == [nn.Embedding, nn.Linear, Own, nn.Linear]
    assert model.state_dict().keys() == build().state_dict().keys()
    for path, weight in expected.items():
        own = model.get_submodule(path).weight
        assert type(own) is nn.Parameter
        assert own.requires_grad
        assert own.dtype == dtype
        assert torch.equal(own, weight)
    for attribute in ("quantization_method", "quantization_report", "is_loaded_in_8bit"):
        assert not hasattr(model, attribute)


def test_another_dtype():
    model = bigq.load_and_quantize_model(build(), None, FORMATS["nf4"], "cpu")
    expected = model[1].dequantize(torch.float16)
    weight = bigq.dequantize(model, torch.float16)[1].weight
    assert weight.dtype == torch.float16
    assert torch.equal(weight, expected)


def test_ties_stay():
    model = nn.ModuleDict({"embedding": nn.Embedding(16, 64), "head": nn.Linear(64, 16, bias=False)})
    model["head"].weight = model["embedding"].weight
    bigq.load_and_quantize_model(model, None, QuantizationConfig("nf4", also_quantize=["embedding"]), "cpu")
    assert isinstance(model["head"], QuantizedLinear)
    bigq.dequantize(model)
    assert model["head"].weight is model["embedding"].weight


def test_what_is_offloaded_comes_to_the_device_that_runs_it(tmp_path):
    config = QuantizationConfig("nf4", offload="quantized")
    model = bigq.load_and_quantize_model(build(), None, config, {"": "cpu", "1": "disk"}, offload_folder=tmp_path)
    expected = run(bigq.load_and_quantize_model(build(), None, config, "cpu"))
    bigq.dequantize(model)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert (run(model) - expected).norm() <= 1e-6 * expected.norm()


def test_it_is_quantized_again_to_the_same_bits():
    model = bigq.load_and_quantize_model(build(), None, QuantizationConfig("nf4"), "cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bigq.load_and_quantize_model(bigq.dequantize(model), None, QuantizationConfig("nf4"), "cpu")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_refusals():
    with pytest.raises(UnsupportedError, match="Sequential holds no quantized weight"):
        bigq.dequantize(build())
    model = bigq.load_and_quantize_model(build(), None, FORMATS["nf4"], "cpu")
    with pytest.raises(ConfigError, match=r"dtype is torch.int8; expected a floating-point dtype"):
        bigq.dequantize(model, torch.int8)
