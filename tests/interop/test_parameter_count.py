"""ParameterCount: a transformers model counts weights, however they are held."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

from bigq import NF4, Int8, QuantizationConfig, load_and_quantize_model, num_parameters


def build(**settings):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=30, num_hidden_layers=2, num_attention_heads=3, intermediate_size=49, **settings
    )
    return transformers.LlamaForCausalLM(config)


def quantized(model, weight_format, *also_quantize):
    return load_and_quantize_model(model, None, QuantizationConfig(weight_format, also_quantize=also_quantize), "cpu")


@pytest.mark.parametrize("weight_format", [NF4(double_quant=True), Int8()], ids=["nf4-double", "int8"])
@pytest.mark.parametrize("also_quantize", [(), ("embed_tokens", "lm_head")], ids=["default", "embeddings too"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_count_is_that_of_the_plain_model(tied, also_quantize, weight_format):
    plain = build(tie_word_embeddings=tied)
    model = quantized(copy.deepcopy(plain), weight_format, *also_quantize)
    assert model.num_parameters() == plain.num_parameters() == num_parameters(model)
    assert model.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True)
    trains = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert model.num_parameters(only_trainable=True) == trains
    assert model.num_parameters(only_trainable=True) == num_parameters(model, only_trainable=True)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_counts_itself(clone):
    model = quantized(build(), NF4())
    other = clone(model)
    expected = model.num_parameters()
    other.model.layers = other.model.layers[:1]
    assert other.num_parameters() < expected
    assert model.num_parameters() == expected


def test_a_model_without_such_a_method_gets_none():
    assert not hasattr(quantized(nn.Sequential(nn.Linear(71, 8)), NF4()), "num_parameters")


def test_exact_numbers():
    layer = quantized(nn.Linear(71, 9), NF4(double_quant=True))
    assert num_parameters(layer) == 71 * 9 + 9
    assert num_parameters(layer, only_trainable=True) == 9
    assert num_parameters(layer.to(torch.bfloat16)) == 71 * 9 + 9
