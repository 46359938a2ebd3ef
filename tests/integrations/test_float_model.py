"""The float model of a folder, or of a repository with a revision or a folder in it, and what is refused."""

import pytest
import torch

from bigq.errors import ConfigError, UnsupportedError
from bigq.integrations.float_model import open_float_model, place_of

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")


@pytest.fixture
def llama(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_a_repository_has_a_revision_and_a_folder(tmp_path):
    places = {
        "owner/name": ("owner/name", {}),
        "owner/name@v1": ("owner/name", {"revision": "v1"}),
        "owner/name/unet@v1": ("owner/name", {"revision": "v1", "subfolder": "unet"}),
        str(tmp_path): (str(tmp_path), {}),
        tmp_path: (str(tmp_path), {}),
    }
    assert {name: place_of(name) for name in places} == places


def test_what_the_library_refuses_is_said(llama, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("offload_folder is missing")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", refuse)
    with pytest.raises(UnsupportedError, match=r"from_pretrained cannot load .*: offload_folder is missing"):
        open_float_model(llama, CPU, device_map="auto")


def test_damaged_files_are_refused(llama):
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM\.from_pretrained cannot load"):
        open_float_model(llama, CPU)


def test_a_quantized_model_is_refused(llama):
    config = llama / "config.json"
    config.write_text(config.read_text().replace("{", '{"quantization_config": {"quant_method": "bigq"},', 1))
    with pytest.raises(ConfigError, match=r"is quantized already \(quant_method 'bigq'\)"):
        open_float_model(llama, CPU)
