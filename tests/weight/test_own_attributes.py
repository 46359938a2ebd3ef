"""Modules with attributes of the names that bigq uses, or that give other tensors than the module holds."""

import copy
import pickle

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils import parametrize

from bigq import ConfigError, QuantizationConfig, QuantizedLinear, QuantizedModule, load_and_quantize_model
from bigq.weight.linear import QuantizedMatrix
from dequantized import dequantized

CONFIG = QuantizationConfig("nf4")


class Named(nn.Linear):
    """A linear with methods and attributes that quantized linears have too."""

    description = "the user's"

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.format, self._fused = "NCHW", True

    def quantize(self, x):
        return torch.round(8 * x) / 8

    def absmax(self):
        return 3.0


class NamedModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = Named(40, 40), nn.Linear(40, 40), nn.Linear(40, 4)
        self.second.format = nn.Linear(40, 40)  # a module inside of a linear

    def forward(self, x):
        assert (self.first.format, self.first.description, self.first._fused) == ("NCHW", "the user's", True)
        x = self.second(self.first.quantize(self.first(x)) * self.first.absmax())
        return self.head(self.second.format(x))


class ReadTwice(nn.Linear):
    """A linear whose weight is read as twice the Parameter."""

    def __getattr__(self, name):
        found = super().__getattr__(name)
        return found * 2 if name == "weight" else found

    def reset_parameters(self):
        for parameter in self._parameters.values():
            nn.init.normal_(parameter)


class PropertyWeight(nn.Linear):
    weight = property(lambda self: self._parameters["weight"] * 2)

    def __init__(self, inputs, outputs):
        nn.Module.__init__(self)
        self.in_features, self.out_features = inputs, outputs
        self._parameters.update(weight=nn.Parameter(torch.randn(outputs, inputs)), bias=None)


class PropertyBias(nn.Linear):
    bias = property(lambda self: self._parameters["bias"] * 3)

    def __init__(self, inputs, outputs):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self._parameters["bias"] = nn.Parameter(torch.randn(outputs))


class Double(nn.Module):
    def forward(self, x):
        return x * 2


def bias_as_a_buffer():
    layer = nn.Linear(40, 40)
    del layer.bias
    layer.register_buffer("bias", torch.randn(40))
    return layer


def bias_as_an_attribute():
    layer = nn.Linear(40, 40)
    del layer.bias
    layer.bias = torch.ones(40)
    return layer


def bias_of_a_parametrization():
    return parametrize.register_parametrization(nn.Linear(40, 40), "bias", Double())


def around(make):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(make(), nn.Linear(40, 40), nn.Linear(40, 3)).eval()

    return build


def rules_of(model):
    return {module.name: module.rule for module in model.quantization_report.modules}


def named_model():
    torch.manual_seed(0)
    return NamedModel().eval()


MODELS = {
    "names of bigq": (named_model, ["first", "second", "second.format"], []),
    "weight by getattr": (around(lambda: ReadTwice(40, 40)), ["1"], ["0"]),
    "weight by property": (around(lambda: PropertyWeight(40, 40)), ["1"], ["0"]),
    "bias by property": (around(lambda: PropertyBias(40, 40)), ["0", "1"], []),
    "bias as buffer": (around(bias_as_a_buffer), ["0", "1"], []),
    "bias as attribute": (around(bias_as_an_attribute), ["0", "1"], []),
    "bias parametrized": (around(bias_of_a_parametrization), ["0", "1"], []),
}


@pytest.mark.parametrize("build, quantized, kept", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("from_file", [False, True], ids=["in place", "checkpoint"])
@torch.no_grad()
def test_it_computes_what_its_dequantized_weights_stand_for(build, quantized, kept, from_file, tmp_path):
    plain, model, source = build(), build(), None
    if from_file:
        source = tmp_path / "checkpoint.pt"
        torch.save(plain.state_dict(), source)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    load_and_quantize_model(model, source, CONFIG, "cpu")
    assert [name for name, module in model.named_modules() if isinstance(module, QuantizedModule)] == quantized
    assert all(type(model.get_submodule(name)) is type(plain.get_submodule(name)) for name in kept)
    x = torch.randn(5, 40)
    expected = dequantized(model, plain)(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    if not any(parametrize.is_parametrized(module) for module in model.modules()):
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    Accelerator().save_model(model, tmp_path / "saved")
    assert torch.equal(load_and_quantize_model(build(), tmp_path / "saved", None, "cpu")(x), model(x))


def test_a_linear_with_a_name_of_a_quantized_linear_reads_its_weight():
    model = load_and_quantize_model(named_model(), None, CONFIG, "cpu")
    assert not any(isinstance(module, QuantizedMatrix) for module in (model.first, model.second))
    assert type(model.second.format) is QuantizedLinear


class Changed(nn.Linear):
    changed = False  # an attribute of every quantized module


def test_a_name_of_every_quantized_module_keeps_the_weight():
    model = nn.Sequential(Changed(40, 40), nn.Linear(40, 40), nn.Linear(40, 3))
    load_and_quantize_model(model, None, CONFIG, "cpu")
    assert type(model[0]) is Changed
    assert rules_of(model)["0"] == "it already has 'changed', an attribute of quantized modules"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Changed(40, 40), "0.weight cannot be quantized: its Changed already has 'changed'"),
        (lambda: ReadTwice(40, 40), "0.weight cannot be quantized: ReadTwice gives what is read as 'weight'"),
    ],
    ids=["name", "getattr"],
)
def test_a_weight_that_the_config_names_is_refused(make, message):
    model = nn.Sequential(make(), nn.Linear(40, 40), nn.Linear(40, 3))
    with pytest.raises(ConfigError, match=message):
        load_and_quantize_model(model, None, QuantizationConfig("nf4", also_quantize=["0"]), "cpu")
    assert not any(isinstance(module, QuantizedModule) for module in model)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.int8], ids=str)
def test_a_linear_that_is_not_floating_point_is_kept(dtype):
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 3))
    model[0].weight = nn.Parameter(torch.ones(40, 40, dtype=dtype), requires_grad=False)
    load_and_quantize_model(model, None, CONFIG, "cpu")
    assert rules_of(model)["0"] == f"its weight is {str(dtype).removeprefix('torch.')}"
    assert torch.equal(model[0].weight, torch.ones(40, 40, dtype=dtype))
    assert type(model[1]) is QuantizedLinear


KINDS = {}


class Registered(nn.Linear):
    """A linear whose subclasses say what they are called."""

    def __init_subclass__(cls, *, called, **kwargs):
        super().__init_subclass__(**kwargs)
        KINDS[called] = cls


class Query(Registered, called="query"):
    pass


def test_a_class_that_registers_its_subclasses_keeps_its_registry():
    model = load_and_quantize_model(nn.Sequential(Query(40, 40)), None, CONFIG, "cpu")
    assert isinstance(model[0], Query)
    assert isinstance(model[0], QuantizedLinear)
    assert dict(KINDS) == {"query": Query}
