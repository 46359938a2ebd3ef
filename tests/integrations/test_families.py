"""from_pretrained with bigq's config for speech, vision with language, encoder-decoders and mixtures of experts."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from bigq import NF4, QuantizationConfig, QuantizedModule

transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
IDS = torch.arange(3, 12)[None]


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return transformers.WhisperForConditionalGeneration(config), {"input_features": torch.randn(1, 8, 40)}


def llava():
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        projection_dim=32,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=63,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    ids = torch.cat([torch.full((1, 4), 63), IDS], dim=1)  # a token for each patch of the image
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 16, 16)}
    return transformers.LlavaForConditionalGeneration(config), inputs


def flan():
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return transformers.T5ForConditionalGeneration(config).bfloat16(), inputs


def mixtral():
    config = transformers.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def qwen3_moe():
    config = transformers.Qwen3MoeConfig(
        **TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16
    )
    return transformers.Qwen3MoeForCausalLM(config), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


# What makes the model and its inputs; how many modules are quantized; the linears that are not.
FAMILIES = {
    "whisper": (whisper, 32, {"proj_out"}),
    "llava": (llava, 28, {"lm_head"}),
    "flan-t5": (flan, 32, {"lm_head", "wo"}),
    "mixtral": (mixtral, 10, {"lm_head"}),
    "qwen3-moe": (qwen3_moe, 10, {"lm_head"}),
}


@pytest.fixture
def loaded(request, tmp_path):
    """(the family's name, a quantized model of it, its inputs)."""
    name, format_name = request.param
    plain, inputs = FAMILIES[name][0]()
    plain.save_pretrained(tmp_path / "plain")
    config = QuantizationConfig(format_name)
    model, info = type(plain).from_pretrained(tmp_path / "plain", quantization_config=config, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return name, model, inputs


each_family = pytest.mark.parametrize(
    "loaded",
    [(name, kind) for name in FAMILIES for kind in ("nf4", "int8")],
    ids="-".join,
    indirect=True,
)


def forward(model, inputs):
    if model.config.is_encoder_decoder:
        inputs = {**inputs, "decoder_input_ids": IDS}
    with torch.no_grad():
        return model(**inputs).logits


def tokens(model, inputs):
    """A transcript, caption or continuation; each family has a `generate` of its own."""
    config = deepcopy(model.generation_config)
    config.max_length = None  # else `generate` says that there are two limits
    return model.generate(**inputs, generation_config=config, max_new_tokens=5, do_sample=False)


@each_family
def test_what_is_quantized_and_what_is_not(loaded):
    name, model, _ = loaded
    quantized = [path for path, module in model.named_modules() if isinstance(module, QuantizedModule)]
    assert len(quantized) == FAMILIES[name][1]
    plain = {path.rpartition(".")[2] for path, module in model.named_modules() if type(module) is nn.Linear}
    assert plain == FAMILIES[name][2]
    if name in ("mixtral", "qwen3-moe"):
        experts = model.model.layers[0].mlp.experts
        assert experts.gate_up_proj_packed.ndim == 3
        assert set(experts.descriptions) == {"gate_up_proj", "down_proj"}
    if name == "flan-t5":  # it overflows in half precision, so the class keeps it in float32
        wo = [tensor.dtype for path, tensor in model.named_parameters() if path.endswith("wo.weight")]
        assert wo == [torch.float32] * 4
        assert model.dtype == torch.bfloat16


@each_family
def test_it_computes_what_its_weights_say(loaded):
    _, model, inputs = loaded
    is_exact = model.dtype == torch.float32 and isinstance(model.config.quantization_config.format, NF4)
    found = forward(model, inputs).float()
    expected = forward(model.dequantize(), inputs).float()
    assert (found - expected).norm() <= (1e-5 if is_exact else 0.03) * expected.norm()


@each_family
def test_it_generates_saves_and_loads_again(loaded, tmp_path):
    _, model, inputs = loaded
    expected, logits = tokens(model, inputs), forward(model, inputs)
    state = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "quantized")
    again = type(model).from_pretrained(tmp_path / "quantized")
    found = again.state_dict()
    assert found.keys() == state.keys()
    assert [path for path in state if not torch.equal(found[path], state[path])] == []
    assert torch.equal(forward(again, inputs), logits)
    assert torch.equal(tokens(again, inputs), expected)
