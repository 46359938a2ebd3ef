"""The folders that quantize_checkpoint makes of models of transformers and diffusers are complete, and load."""

import json
from functools import partial

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

import bigq.checkpoint.hub as hub_module
from bigq import (
    CheckpointError,
    QuantizationConfig,
    UnsupportedError,
    load_and_quantize_model,
    quantize_checkpoint,
)
from bigq.converting import push
from bigq.integrations.skeleton import build_skeleton
from fake_hub import FakeHub
from mock_hub import mock_hub
from quantized_folders import assert_same, load_and_save, read_folder

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).bfloat16(),
    "tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "experts": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4)),
    "conv1d": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
}
NF4, DOUBLE = QuantizationConfig("nf4"), QuantizationConfig("nf4", double_quant=True)
PAIRS = {
    "llama": [("bigq", NF4), ("bitsandbytes", DOUBLE), ("compressed-tensors", QuantizationConfig("int8"))],
    "tied": [("bigq", QuantizationConfig("nf4", also_quantize=["embed_tokens", "lm_head"])), ("bitsandbytes", NF4)],
    "experts": [("bigq", QuantizationConfig(rules={"*.experts": "int8", "*.self_attn": "nf4"}, dtype="bf16"))],
    "conv1d": [("bigq", DOUBLE), ("bitsandbytes", DOUBLE)],
}


@pytest.fixture
def source(tmp_path):
    """A folder with a sharded Llama and what lies beside weights."""
    folder = tmp_path / "source"
    MODELS["llama"]().save_pretrained(folder, max_shard_size="40KB")
    files = {
        "generation_config.json": '{"temperature": 0.25, "do_sample": true}',
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "LICENSE.txt": "terms",
        "README.md": "---\nlicense: apache-2.0\nlanguage: de\n---\n# A model\n",
        "modeling_own.py": "",
        "1_Pooling/config.json": "{}",
        "pytorch_model.bin.index.json": "{}",
        "events.out": "",
        ".git/config.json": "{}",
        "onnx/config.json": "{}",
        "onnx/model.safetensors": "",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def convert(source, to, config="nf4", **settings):
    return quantize_checkpoint(source, to, config, device="cpu", progress=False, **settings)


@pytest.mark.parametrize("name", MODELS)
def test_tensors_and_config_are_those_of_load_and_save(name, tmp_path):
    MODELS[name]().save_pretrained(tmp_path / "source", max_shard_size="40KB")
    for layout, config in PAIRS[name]:
        skeleton = build_skeleton(tmp_path / "source")
        expected = load_and_save(skeleton, tmp_path / "source", config, tmp_path / f"expected-{layout}", layout)
        for size in ("5GB", "40KB"):
            to = tmp_path / f"{layout}-{size}"
            made = convert(tmp_path / "source", to, config, layout=layout, max_shard_size=size)
            assert (len(made.files) > 1) == (size == "40KB")
            assert_same(to, expected)
            for file in ("config.json", "generation_config.json"):
                assert (to / file).read_text() == (expected / file).read_text()


def test_from_pretrained_loads_the_folder_and_save_pretrained_writes_its_tensors(source, tmp_path):
    convert(source, tmp_path / "to")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "to")
    expected = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=NF4)
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids).logits, expected(ids).logits)
    expected.save_pretrained(tmp_path / "expected")
    assert_same(tmp_path / "to", tmp_path / "expected")


def test_what_lies_beside_the_weights_comes_along(source, tmp_path):
    convert(source, tmp_path / "to")
    names = sorted(path.relative_to(tmp_path / "to").as_posix() for path in (tmp_path / "to").rglob("*.*"))
    assert names == [
        "1_Pooling/config.json",
        "LICENSE.txt",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_own.py",
        "tokenizer.json",
    ]
    assert json.loads((tmp_path / "to" / "generation_config.json").read_text())["temperature"] == 0.25
    card = ModelCard.load(tmp_path / "to" / "README.md")
    assert (card.data.license, card.data.language, card.data.tags) == ("apache-2.0", "de", ["bigq", "nf4"])
    assert "LlamaForCausalLM, quantized to nf4" in card.text
    convert(source, tmp_path / "theirs", layout="bitsandbytes")
    assert ModelCard.load(tmp_path / "theirs" / "README.md").data.tags == ["bitsandbytes", "nf4"]


def test_a_repository_of_the_hub(tmp_path, monkeypatch, source):
    hub = FakeHub(tmp_path / "hub")
    (tmp_path / "hub").mkdir()
    hub.publish().rmdir()
    source.rename(hub.source)
    monkeypatch.setattr(hub_module, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(hub_module, "HfApi", lambda: hub)
    monkeypatch.chdir(tmp_path)
    convert("owner/name@v1", tmp_path / "to")
    assert_same(tmp_path / "to", load_and_save(build_skeleton(hub.source), hub.source, NF4, tmp_path / "expected"))
    assert (tmp_path / "to" / "tokenizer.json").exists()
    assert ModelCard.load(tmp_path / "to" / "README.md").data.base_model == "owner/name"
    assert "events.out" not in hub.downloaded
    assert {revision for _, revision, _ in hub.downloads} == {"v1"}


def test_code_that_comes_with_a_model(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "modeling_mine.py").write_text(
        "from torch import nn\nfrom transformers import PreTrainedConfig, PreTrainedModel\n"
        "class MyConfig(PreTrainedConfig):\n    model_type = 'mine'\n"
        "class MyModel(PreTrainedModel):\n    config_class = MyConfig\n"
        "    def __init__(self, config):\n        super().__init__(config)\n"
        "        self.q, self.out = nn.Linear(64, 64), nn.Linear(64, 4)\n        self.post_init()\n"
    )
    remote = {"AutoConfig": "modeling_mine.MyConfig", "AutoModel": "modeling_mine.MyModel"}
    said = {"model_type": "mine", "architectures": ["MyModel"], "auto_map": remote}
    (tmp_path / "source" / "config.json").write_text(json.dumps(said))
    state = {"q.weight": torch.randn(64, 64), "q.bias": torch.zeros(64)}
    state |= {"out.weight": torch.randn(4, 64), "out.bias": torch.zeros(4)}
    torch.save(state, tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="trust_remote_code=True"):
        convert(tmp_path / "source", tmp_path / "to")
    convert(tmp_path / "source", tmp_path / "to", trust_remote_code=True)
    assert json.loads((tmp_path / "to" / "config.json").read_text())["auto_map"] == remote
    again = build_skeleton(tmp_path / "to", trust_remote_code=True)
    load_and_quantize_model(again, tmp_path / "to", device_map="cpu", progress=False)
    assert "weight" in again.q.descriptions


def test_a_model_of_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, num_layers=2, sample_size=4, num_embeds_ada_norm=10
    )
    model.save_pretrained(tmp_path / "source")
    for size in ("5GB", "100KB"):
        to = tmp_path / size
        made = convert(tmp_path / "source", to, max_shard_size=size)
        assert all(name.startswith("diffusion_pytorch_model") for name in made.files)
        expected = type(model).from_pretrained(tmp_path / "source", quantization_config=NF4, device_map={"": "cpu"})
        expected.save_pretrained(tmp_path / "expected")
        assert_same(to, tmp_path / "expected")
        own, theirs = (json.loads((path / "config.json").read_text()) for path in (to, tmp_path / "expected"))
        said = own["quantization_config"] | {"dtype": "float32"}  # from_pretrained asks for one
        assert said == theirs["quantization_config"]
        again = type(model).from_pretrained(to)
        assert again.quantization_method == "bigq"
        assert read_folder(to).keys() == again.state_dict().keys()


def test_a_folder_is_pushed(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "to", max_shard_size="40KB")
    monkeypatch.setattr(push, "get_token", lambda: None)
    with pytest.raises(UnsupportedError, match=r"run `hf auth login`"):
        push.push_folder(tmp_path / "to", "owner/name")
    monkeypatch.setattr(push, "get_token", lambda: "hf_none")
    (tmp_path / "pushed" / "1_Pooling").mkdir(parents=True)
    with mock_hub(tmp_path / "pushed") as address:
        monkeypatch.setattr(push, "HfApi", partial(HfApi, address, token="hf_none"))
        assert push.push_folder(tmp_path / "to", "owner/name") == f"{address}/owner/name"
    with pytest.raises(CheckpointError, match=r"cannot upload to 'owner/name'.*run `hf upload owner/name .*to`"):
        push.push_folder(tmp_path / "to", "owner/name")  # the Hub is gone
    assert_same(tmp_path / "pushed", tmp_path / "to")
    files = {path.relative_to(tmp_path / "to") for path in (tmp_path / "to").rglob("*.*")}
    assert {path.relative_to(tmp_path / "pushed") for path in (tmp_path / "pushed").rglob("*.*")} == files
