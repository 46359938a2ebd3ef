"""Where the two models of a comparison come from: folders, and repositories with a revision or a folder in them."""

import pytest
import torch

import bigq
from bigq.errors import ConfigError, UnsupportedError
from bigq.evaluation.open_models import _place, files_nbytes, open_quantized_model, open_source_model, source_tensors
from bigq.evaluation.outputs import is_causal


def test_a_repository_has_a_revision_and_a_folder(tmp_path):
    places = {
        "owner/name": ("owner/name", {}),
        "owner/name@v1": ("owner/name", {"revision": "v1"}),
        "owner/name/unet@v1": ("owner/name", {"revision": "v1", "subfolder": "unet"}),
        str(tmp_path): (str(tmp_path), {}),
        tmp_path: (str(tmp_path), {}),
    }
    assert {name: _place(name) for name in places} == places


def test_the_source_is_read_from_its_headers(llama):
    source = source_tensors(llama)
    assert source.tensors["model.layers.1.mlp.up_proj.weight"].shape == (96, 64)
    assert files_nbytes(llama) == (llama / "model.safetensors").stat().st_size


def test_both_models_are_in_eval_mode(llama):
    cpu = torch.device("cpu")
    models = [
        open_source_model(llama, cpu),
        open_quantized_model(llama, None, bigq.QuantizationConfig("nf4"), cpu),
    ]
    assert [type(model).__name__ for model in models] == ["LlamaForCausalLM"] * 2
    assert not any(model.training for model in models)
    assert all(map(is_causal, models))
    with pytest.raises(ConfigError, match="pass either a quantized checkpoint or a config"):
        open_quantized_model(llama, llama, bigq.QuantizationConfig("nf4"), cpu)


def test_what_the_library_refuses_is_said(llama, monkeypatch):
    transformers = pytest.importorskip("transformers")

    def refuse(*args, **kwargs):
        raise ValueError("offload_folder is missing")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", refuse)
    cpu = torch.device("cpu")
    with pytest.raises(UnsupportedError, match=r"from_pretrained cannot load .*: offload_folder is missing"):
        open_source_model(llama, cpu, device_map="auto")
