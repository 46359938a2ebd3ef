"""convert: the class of a module whose weights are quantized."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from bigq import NF4, QuantizationConfig, QuantizedLinear, QuantizedModule, load_and_quantize_model
from bigq.weight.linear import QuantizedConv1D, QuantizedEmbedding

CONFIG = QuantizationConfig(NF4())


class Projection(nn.Linear):
    """A linear under a name of its own."""

    def extra(self):
        return self.in_features + 1


class Scaled(nn.Linear):
    """A linear with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def quantized(module, *also_quantize):
    return load_and_quantize_model(module, None, QuantizationConfig(NF4(), also_quantize=also_quantize), "cpu")


def test_a_linear_becomes_the_one_class_of_quantized_linears():
    layer = nn.Linear(71, 8)
    assert quantized(layer) is layer
    assert type(layer) is QuantizedLinear


@pytest.mark.parametrize(
    "make, base",
    [
        (lambda: Projection(71, 8), QuantizedLinear),
        (lambda: Conv1D(8, 71), QuantizedConv1D),
        (lambda: nn.Embedding(50, 71), QuantizedEmbedding),
        (lambda: Scaled(71, 8), QuantizedModule),
    ],
    ids=["subclass", "conv1d", "embedding", "own-forward"],
)
def test_a_module_becomes_a_subclass_of_its_own_class(make, base):
    kind = type(make())
    first, second = quantized(make(), "weight"), quantized(make(), "weight")
    assert type(first) is type(second)
    assert isinstance(first, kind)
    assert isinstance(first, base)
    assert type(first).__name__ == f"Quantized{kind.__name__}"
    assert type(first).__module__ == kind.__module__


def test_a_conv1d_is_no_linear():
    layer = quantized(Conv1D(8, 71))
    assert not isinstance(layer, nn.Linear)
    assert tuple(layer.weight.shape) == (71, 8)
    assert (layer.nf, layer.nx) == (8, 71)


def test_a_subclass_keeps_its_methods():
    assert quantized(Projection(71, 8)).extra() == 72


def test_a_forward_of_its_own_reads_the_weight():
    layer = quantized(Scaled(71, 8), "weight")
    x = torch.randn(3, 71)
    torch.testing.assert_close(layer(x), 2 * nn.functional.linear(x, layer.weight.dequantize(), layer.bias))


def test_what_refers_to_a_module_still_does_after_it_is_converted():
    layer, heard = nn.Linear(71, 8), []
    first, second = nn.Sequential(layer), nn.Sequential(layer)
    layer.register_forward_hook(lambda *_: heard.append(1))
    quantized(nn.ModuleList([first, second]))
    assert first[0] is second[0] is layer
    first(torch.ones(1, 71))
    assert heard == [1]


def test_the_state_stands_where_the_weight_stood():
    layer = quantized(nn.Linear(71, 8))
    assert list(layer.state_dict()) == ["weight_packed", "weight_absmax", "quant_state", "bias"]


@pytest.mark.parametrize("make", [lambda: nn.Linear(71, 8), lambda: Projection(71, 8), lambda: Conv1D(8, 71)])
def test_a_class_made_at_run_time_is_found_again(make):
    layer = quantized(make())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert type(other) is type(layer)
