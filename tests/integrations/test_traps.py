"""What other libraries do to models that are quantized, and would do silently: casts, skip lists, defaults, configs."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as distributed_checkpoint

import bigq
from bigq import QuantizationConfig, QuantizedLinear, QuantizedModule

transformers = pytest.importorskip("transformers")
import bigq.integrations.transformers  # noqa: E402 - it needs transformers

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "tie_word_embeddings": False,
}
IDS = torch.arange(9)[None]
each_format = pytest.mark.parametrize("format_name", ["nf4", "int8"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama in float16."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).half().save_pretrained(path)
    return path


def load(path, format_name=None, kind=None, **settings):
    kind = kind or transformers.AutoModelForCausalLM
    if format_name is None:
        return kind.from_pretrained(path)
    return kind.from_pretrained(path, quantization_config=QuantizationConfig(format_name, **settings))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert [name for name in one if one[name].dtype != other[name].dtype] == []


def quantized(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantizedModule)}


@each_format
def test_nothing_of_a_weight_is_a_buffer_or_one_dimensional(folder, format_name):
    """Tensor parallelism shards no buffers, and its plans cut a vector of row scales where the rows stay whole."""
    for module in quantized(load(folder, format_name)).values():
        assert not list(module.buffers())
        parts = {name: tensor for name, tensor in module.named_parameters() if name.startswith("weight_")}
        assert set(parts) == {"weight_packed", "weight_absmax"}
        assert all(tensor.ndim == 2 and len(tensor) == module.out_features for tensor in parts.values())
        assert module._hf_quantized_needs_local_tp  # else tensor parallelism multiplies with wrong shards


@each_format
def test_experts_keep_their_leading_dimension(tmp_path, format_name):
    config = transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    experts = load(tmp_path, format_name).model.layers[1].mlp.experts
    per_byte, block = (2, 64) if format_name == "nf4" else (1, 64)
    assert experts.gate_up_proj_packed.shape == (4, 192, 64 // per_byte)
    assert experts.gate_up_proj_absmax.shape == (4, 192, 64 // block)


@each_format
def test_the_default_dtype_reaches_no_scale(folder, format_name):
    """transformers makes models under the model's dtype, and casts what it loads to that of the skeleton."""
    expected = state(load(folder, format_name))
    try:
        torch.set_default_dtype(torch.bfloat16)
        found = state(load(folder, format_name))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(found, expected)


@each_format
def test_casting_a_model_is_refused_or_changes_no_scale(folder, format_name):
    model = load(folder, format_name)
    for cast in (model.half, model.float):
        with pytest.raises(ValueError, match="is not supported for quantized model"):
            cast()
    before = state(model)
    model.to(torch.bfloat16)  # not refused for quantizers that transformers does not know
    after = state(model)
    changed = {
        name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name].to(before[name]))
    }
    assert changed <= {"quant_state", "weight"}  # the dtype that a weight has when it is read; what is not quantized
    assert after["model.layers.0.mlp.up_proj.weight_absmax"].dtype == torch.int32
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["AutoModelForCausalLM", "LlamaForCausalLM"])
def test_a_config_of_none_does_not_hide_the_saved_one(folder, tmp_path, kind):
    """An Auto class replaces the saved config by None: the placeholders make that an error."""
    model = load(folder, "int8")
    model.save_pretrained(tmp_path)
    kind = getattr(transformers, kind)
    if kind is transformers.AutoModelForCausalLM:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            kind.from_pretrained(tmp_path, quantization_config=None)
    else:
        assert_same(state(kind.from_pretrained(tmp_path, quantization_config=None)), state(model))


def test_the_saved_config_wins_over_another_and_transformers_says_so(folder, tmp_path):
    model = load(folder, "int8")
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        again = load(tmp_path, "nf4")
    assert_same(state(again), state(model))


def test_a_config_is_used_twice_and_not_changed(folder, tmp_path):
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4)
    ).save_pretrained(tmp_path)
    config, same = QuantizationConfig("nf4"), QuantizationConfig("nf4")
    for path in (folder, tmp_path, folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
        assert config == same
        assert not isinstance(model.get_output_embeddings(), QuantizedModule)


class TestSkipLists:
    def test_a_list_adds_to_the_head(self, folder):
        model = load(folder, "nf4", skip_modules=["q_proj"])
        assert type(model.lm_head) is nn.Linear
        assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
        assert len(quantized(model)) == 12

    @pytest.mark.parametrize("name", ["vision_tower", "model.vision_tower"])
    def test_a_name_means_all_that_is_in_it(self, tmp_path, name):
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**vision, image_size=16, patch_size=8),
            text_config=transformers.LlamaConfig(**SMALL),
            image_token_index=63,
        )
        transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
        model = load(tmp_path, "nf4", transformers.LlavaForConditionalGeneration, skip_modules=[name])
        assert quantized(model)
        assert not [path for path in quantized(model) if "vision_tower" in path]

    def test_a_head_with_a_bias_is_a_head(self, tmp_path):
        """The last parameter is a bias: a search for the last weight by its name finds none."""
        config = transformers.BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
        )
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
        model = load(tmp_path, "nf4", transformers.BertForSequenceClassification)
        assert type(model.classifier) is nn.Linear
        assert isinstance(model.bert.pooler.dense, QuantizedLinear)

    def test_a_router_stays_if_it_is_no_linear(self, tmp_path):
        config = transformers.Qwen3MoeConfig(
            **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16
        )
        transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
        model = load(tmp_path, "nf4")
        assert {type(layer.mlp.gate).__name__ for layer in model.model.layers} == {"Qwen3MoeTopKRouter"}
        assert set(quantized(model.model.layers[0].mlp)) == {"experts"}


def test_a_device_mesh_that_bigq_has_not_seen_is_refused():
    """Each rank would quantize its part alone."""
    quantizer = bigq.integrations.transformers.LoadingQuantizer(QuantizationConfig("nf4"), pre_quantized=False)
    with pytest.raises(bigq.UnsupportedError, match=r"call bigq\.integrations\.tensor_parallel\.parallelize_module"):
        quantizer.load(nn.Linear(64, 64), ["model.safetensors"], SimpleNamespace(device_mesh=object()))


@each_format
def test_saving_after_a_forward_pass_saves_the_same(folder, tmp_path, format_name):
    model = load(folder, format_name)
    expected = state(model)
    logits(model)
    model.save_pretrained(tmp_path)
    assert_same(state(model), expected)
    assert_same(state(load(tmp_path)), expected)


@pytest.mark.parametrize("wrapped", [False, True], ids=["the-model", "in-a-wrapper"])
def test_a_model_that_bigq_dequantized_is_no_quantized_one_to_transformers(folder, tmp_path, wrapped):
    model = load(folder, "nf4")
    bigq.dequantize(nn.Sequential(model) if wrapped else model)
    assert not model.is_quantized
    assert model.half() is model
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = load(tmp_path)
    assert not quantized(again)
    assert_same(state(again), state(model))
    with pytest.raises(ValueError, match="need to first quantize"):
        model.dequantize()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@each_format
def test_a_distributed_checkpoint_holds_a_quantized_model(folder, tmp_path, format_name):
    model = load(folder, format_name)
    distributed_checkpoint.save(model.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    other = load(folder, format_name)
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.zero_()
    found = other.state_dict()
    distributed_checkpoint.load(found, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(found)
    assert_same(state(other), state(model))
    assert torch.equal(logits(other), logits(model))
