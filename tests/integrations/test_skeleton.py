"""The model of a config.json, with no numbers and no weights read."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from bigq import CheckpointError, QuantizationConfig, UnsupportedError, load_and_quantize_model
from bigq.checkpoint import hub as hub_module
from bigq.integrations.skeleton import build_skeleton
from fake_hub import FakeHub

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
LLAMA = {"vocab_size": 64, **SMALL, "num_key_value_heads": 2, "dtype": "bfloat16"}
CUSTOM = """
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

class OwnConfig(PretrainedConfig):
    model_type = "own"

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.q = nn.Linear(8, 8)
        self.post_init()
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(hub_module, "snapshot_download", fake.snapshot_download)
    return fake


def write(folder, **said):
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def test_it_loads_the_folder_that_save_pretrained_wrote(tmp_path):
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    skeleton = build_skeleton(tmp_path)
    assert type(skeleton) is transformers.LlamaForCausalLM
    assert not skeleton.training
    assert {(p.device.type, p.dtype) for p in skeleton.parameters()} == {("meta", torch.bfloat16)}
    assert skeleton.lm_head.weight is skeleton.model.embed_tokens.weight
    assert torch.get_default_dtype() == torch.float32
    nf4, ids = QuantizationConfig("nf4"), torch.arange(4)[None]
    with torch.no_grad():
        expected = load_and_quantize_model(model, None, nf4, "cpu")(ids).logits
        assert torch.equal(load_and_quantize_model(skeleton, tmp_path, nf4, "cpu")(ids).logits, expected)


@pytest.mark.parametrize(
    "said, kind",
    [
        ({"model_type": "bert", **SMALL}, "BertModel"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"], **SMALL}, "BertForMaskedLM"),
        ({"model_type": "bert", "architectures": ["OfAnotherLibrary"], **SMALL}, "BertModel"),
        (
            {"model_type": "llama", "architectures": ["LlamaModel"], "quantization_config": {"quant_method": "awq"}}
            | LLAMA,
            "LlamaModel",
        ),
    ],
    ids=["no class named", "class named", "unknown class named", "quantized"],
)
def test_the_class_is_the_one_that_config_json_names(said, kind, tmp_path):
    skeleton = build_skeleton(write(tmp_path, **said))
    assert type(skeleton).__name__ == kind
    assert not hasattr(skeleton.config, "quantization_config")


def test_a_model_of_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=4, num_embeds_ada_norm=10
    )
    model.save_pretrained(tmp_path)
    skeleton = build_skeleton(tmp_path)
    assert type(skeleton) is type(model)
    assert not skeleton.training
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in skeleton.named_parameters()} == shapes
    assert all(p.is_meta for p in skeleton.parameters())


def test_code_that_comes_with_the_model_runs_only_if_it_may(tmp_path):
    (tmp_path / "modeling_own.py").write_text(CUSTOM)
    remote = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    write(tmp_path, model_type="own", architectures=["OwnModel"], auto_map=remote)
    assert type(build_skeleton(tmp_path, trust_remote_code=True)).__name__ == "OwnModel"
    with pytest.raises(UnsupportedError, match="trust_remote_code=True"):
        build_skeleton(tmp_path)


def test_of_a_repository_only_the_config_is_downloaded(hub):
    source = write(hub.publish(), model_type="bert", **SMALL)
    save_file({"a": torch.ones(2)}, source / "model.safetensors")
    (source / "modeling.py").touch()
    assert type(build_skeleton("owner/name@v1")).__name__ == "BertModel"
    assert hub.downloaded == ["config.json"]
    build_skeleton("owner/name@v1", revision="v2", trust_remote_code=True)
    assert hub.downloaded == ["config.json", "modeling.py"]
    assert [revision for _, revision, _ in hub.downloads] == ["v1", "v2"]


def test_refusals_say_what_to_do(tmp_path, hub):
    (tmp_path / "empty").mkdir()
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    (tmp_path / "file").touch()
    for place, words in {
        tmp_path / "empty": "has no config.json.*build the model with its own library",
        tmp_path / "pipeline": "pipeline of diffusers: pass one of its models",
        tmp_path / "file": "is a file; expected the folder",
        "no/such/folder/../x": "no such folder",
        "owner/name": "could not be reached",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            build_skeleton(place)
    for said, error, words in [
        ({"architecture": "resnet50"}, CheckpointError, "names no model: expected `model_type`"),
        ({"model_type": "of_tomorrow"}, UnsupportedError, "cannot build the model of .*of_tomorrow"),
        ({"_class_name": "NoModel"}, UnsupportedError, "diffusers .* has no model 'NoModel'"),
        ({}, CheckpointError, "is no JSON object"),
    ]:
        with pytest.raises(error, match=words):
            build_skeleton(write(tmp_path, **said))


def test_without_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedError, match="pip install transformers"):
        build_skeleton(write(tmp_path, model_type="bert"))
