"""Where the two models of a comparison come from."""

import pytest
import torch

import bigq
from bigq.errors import ConfigError
from bigq.evaluation.open_models import files_nbytes, open_quantized_model, source_tensors
from bigq.evaluation.outputs import is_causal
from bigq.integrations.float_model import open_float_model


def test_the_source_is_read_from_its_headers(llama):
    source = source_tensors(llama)
    assert source.tensors["model.layers.1.mlp.up_proj.weight"].shape == (96, 64)
    assert files_nbytes(llama) == (llama / "model.safetensors").stat().st_size


def test_both_models_are_in_eval_mode(llama):
    cpu = torch.device("cpu")
    models = [
        open_float_model(llama, cpu),
        open_quantized_model(llama, None, bigq.QuantizationConfig("nf4"), cpu),
    ]
    assert [type(model).__name__ for model in models] == ["LlamaForCausalLM"] * 2
    assert not any(model.training for model in models)
    assert all(map(is_causal, models))
    with pytest.raises(ConfigError, match="pass either a quantized checkpoint or a config"):
        open_quantized_model(llama, llama, bigq.QuantizationConfig("nf4"), cpu)
