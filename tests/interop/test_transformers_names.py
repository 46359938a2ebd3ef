"""transformers_names: what transformers saves is what it loads, and so does bigq, bit for bit."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from bigq import QuantizationConfig, load_and_quantize_model
from bigq.interop.transformers_names import names_in_files, rows_in_files

transformers = pytest.importorskip("transformers", minversion="5.17", reason="needs transformers' conversions of names")
NF4 = QuantizationConfig("nf4")
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT = {"vocab_size": 64, **SMALL, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE = {**SMALL, "image_size": 16, "patch_size": 8}
VISION = {"text_config": {"model_type": "llama", **TEXT}, "vision_config": {"model_type": "clip_vision_model", **IMAGE}}


def build(name, config, **settings):
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()


MODELS = {
    "renamed": build("GPTNeoXForCausalLM", "GPTNeoXConfig", **TEXT),
    "renamed in a submodule": build("ViTForImageClassification", "ViTConfig", **IMAGE),
    "split": build("Dinov2Model", "Dinov2Config", **IMAGE, use_swiglu_ffn=True),
    "experts in one": build("MixtralForCausalLM", "MixtralConfig", **TEXT, num_local_experts=3),
    "two of experts in one": build(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", **TEXT, num_experts=3, moe_intermediate_size=32, head_dim=16
    ),
    "with a prefix": build("LlavaForConditionalGeneration", "LlavaConfig", **VISION, image_token_index=60),
    "with a buffer left out": build("EsmForMaskedLM", "EsmConfig", **{**SMALL, "vocab_size": 33, "pad_token_id": 1}),
    "as it is": build("LlamaForCausalLM", "LlamaConfig", **TEXT),
}


def skeleton(empty, name):
    model = empty(MODELS[name])
    model.tie_weights()
    return model


def assert_same(model, other):
    assert model.state_dict().keys() == other.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("name", MODELS)
def test_what_save_pretrained_writes_loads(empty, tmp_path, name):
    plain = MODELS[name]()
    plain.save_pretrained(tmp_path / "plain")
    own_names = plain.state_dict().keys() == load_file(tmp_path / "plain" / "model.safetensors").keys()
    assert own_names == (name == "as it is"), "the model is one that shows something"
    model = load_and_quantize_model(skeleton(empty, name), tmp_path / "plain", NF4, "cpu")
    assert_same(model, load_and_quantize_model(plain, None, NF4, "cpu"))
    model.save_pretrained(tmp_path / "quantized")
    assert_same(load_and_quantize_model(skeleton(empty, name), tmp_path / "quantized", None, "cpu"), model)


@pytest.mark.parametrize("name", MODELS)
def test_the_models_own_names_load_as_well(empty, tmp_path, name):
    plain = MODELS[name]()
    save_file({key: tensor.clone() for key, tensor in plain.state_dict().items()}, tmp_path / "model.safetensors")
    model = load_and_quantize_model(skeleton(empty, name), tmp_path, NF4, "cpu")
    assert_same(model, load_and_quantize_model(plain, None, NF4, "cpu"))


def test_a_file_of_the_base_model(empty, tmp_path):
    plain = build("GPT2LMHeadModel", "GPT2Config", **{**TEXT, "n_embd": 64, "n_layer": 1, "n_head": 4})
    model = plain()
    save_file(model.transformer.state_dict(), tmp_path / "model.safetensors")
    loaded = load_and_quantize_model(empty(plain), tmp_path, NF4, "cpu")
    assert_same(loaded, load_and_quantize_model(model, None, NF4, "cpu"))


def test_experts_are_read_where_they_lie(empty, tmp_path):
    from bigq.checkpoint import Checkpoint
    from bigq.interop.transformers_names import with_transformers_names
    from bigq.model.tree import ModelTree

    MODELS["experts in one"]().save_pretrained(tmp_path)
    model = skeleton(empty, "experts in one")
    source = with_transformers_names(ModelTree(model), Checkpoint.open(tmp_path))
    for name in ("gate_up_proj", "down_proj"):
        assert source.tensors[f"model.layers.0.mlp.experts.{name}"].spans, name


@pytest.mark.parametrize("missing", ["get_model_conversion_mapping", "WeightConverter", "rename_source_key"])
def test_another_transformers_is_told_and_its_names_are_taken_as_they_are(empty, tmp_path, monkeypatch, missing):
    for module in ("transformers.conversion_mapping", "transformers.core_model_loading"):
        monkeypatch.delattr(sys.modules[module], missing, raising=False)
    model = MODELS["as it is"]()
    state = {**model.state_dict(), "more": torch.ones(2)}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"transformers 5.* does not convert checkpoints as bigq knows it"):
        loaded = load_and_quantize_model(skeleton(empty, "as it is"), tmp_path, NF4, "cpu", strict=False)
    assert_same(loaded, load_and_quantize_model(model, None, NF4, "cpu"))


@pytest.mark.parametrize("name", ["experts in one", "two of experts in one"])
def test_rows_and_names_in_files_are_those_that_save_pretrained_writes(tmp_path, name):
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    saved, held = load_file(tmp_path / "model.safetensors"), model.state_dict()
    stacks = {own: tuple(tensor.shape) for own, tensor in held.items() if tensor.dim() == 3}
    rows, renamed = rows_in_files(model, stacks), names_in_files(model, held)
    assert rows.keys() == stacks.keys()
    found = {renamed.get(own, own): tensor for own, tensor in held.items() if own not in rows}
    for stack, parts in rows.items():
        found |= {new: held[stack].flatten(0, 1)[part.start : part.stop] for new, part in parts.items()}
    assert found.keys() == saved.keys()
    assert [own for own, tensor in found.items() if not torch.equal(tensor, saved[own])] == []


def test_stacks_of_models_whose_files_hold_them_whole_have_no_rows():
    config = transformers.GptOssConfig(**TEXT, num_local_experts=3, head_dim=16)
    model = transformers.GptOssForCausalLM(config)
    assert rows_in_files(model, {"model.layers.0.mlp.experts.gate_up_proj": (3, 64, 192)}) == {}
    assert rows_in_files(torch.nn.Linear(2, 2), {"weight": (2, 2, 2)}) == {}
