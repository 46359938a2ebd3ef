"""mixture: a tiny model of each architecture of transformers that has experts."""

import pytest
import torch
from torch import nn

# Names of sizes in configs, by size. A config takes those that it has.
_NAMES = {
    1: "n_shared_experts num_shared_experts moe_num_shared_experts zero_expert_num n_group topk_group n_groups "
    "mamba_n_groups first_k_dense_replace num_dense_layers moe_layer_start_index bos_token_id eos_token_id "
    "pad_token_id decoder_start_token_id",
    2: "num_hidden_layers n_layers num_layers num_decoder_layers encoder_layers decoder_layers num_key_value_heads "
    "swa_num_key_value_heads index_n_heads num_experts_per_tok moe_k moe_topk",
    4: "num_attention_heads n_heads num_heads swa_num_attention_heads encoder_attention_heads "
    "decoder_attention_heads linear_num_key_heads linear_num_value_heads index_topk",
    8: "num_experts num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads sliding_window "
    "attention_chunk_size chunk_size",
    16: "head_dim v_head_dim kv_channels qk_nope_head_dim qk_rope_head_dim d_kv swa_head_dim swa_v_head_dim "
    "index_head_dim linear_key_head_dim linear_value_head_dim mamba_head_dim mamba_d_state mamba_d_head ssm_state_size",
    32: "qk_head_dim q_lora_rank kv_lora_rank o_lora_rank",
    64: "hidden_size d_model conv_dim conv_dim_out moe_intermediate_size expert_ffn_hidden_size share_expert_dim "
    "expert_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
    "shared_intermediate_size moe_latent_size",
    96: "intermediate_size ffn_hidden_size intermediate_size_mlp d_ff encoder_ffn_dim decoder_ffn_dim",
    128: "vocab_size max_position_embeddings max_seq_len",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
TOP_K = ("num_experts_per_tok", "moe_k", "moe_topk")


def rope(**settings: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **settings}}


ALL_HEADS = {"num_key_value_heads": 4}
SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
PER_LAYER = {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16}
GEMMA = {
    "layer_types": ["sliding_attention", "full_attention"],
    "global_head_dim": 16,
    "num_global_key_value_heads": 2,
    "top_k_experts": 2,
}
GLM5 = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "qk_rope_head_dim": 0,
    "rope_parameters": None,
    "index_topk": 16,
    "index_kpool": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
}
QWEN4 = {
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "hc_lowrank": 8,
    "ple_layer_ids": [1],
    "ple_embed_dim": 16,
    "ngram_vocab_size_base": 100,
    "heads_per_ngram": 2,
    "split_ngram_parts": 1,
}
DBRX = {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 8, "moe_top_k": 2}

# {class of the model: what its config needs besides SIZES}
MIXTURES = {
    "AfmoeForCausalLM": {},
    "AriaTextForCausalLM": {},
    "AXK1ForCausalLM": ALL_HEADS,
    "AXK2ForCausalLM": ALL_HEADS,
    "BailingHybridForCausalLM": HYBRID | ALL_HEADS,
    "BeamForCausalLM": SPARSE,
    "Cohere2MoeForCausalLM": {},
    "DbrxForCausalLM": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}, "ffn_config": DBRX},
    "DeepseekOcr2TextModel": SPARSE | ALL_HEADS | {"n_group": 1, "topk_group": 1},
    "DeepseekV2ForCausalLM": ALL_HEADS,
    "DeepseekV32ForCausalLM": ALL_HEADS,
    "DeepseekV3ForCausalLM": ALL_HEADS,
    "DeepseekV4ForCausalLM": {},
    "DiffusionGemmaEncoderTextModel": GEMMA,
    "Dots1ForCausalLM": {},
    "Dots3NoteForCausalLM": ALL_HEADS,
    "Ernie4_5_MoeForCausalLM": {},
    "Ernie4_5_VLMoeTextModel": {"moe_intermediate_size": [64, 48]} | rope(mrope_section=[2, 2, 4]),
    "ExaoneMoeForCausalLM": {},
    "FlexOlmoForCausalLM": {},
    "FlintForCausalLM": {"mlp_only_layers": [], "decoder_sparse_step": 1},
    "Gemma4ForCausalLM": GEMMA
    | {"enable_moe_block": True, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16},
    "Glm4MoeForCausalLM": {},
    "Glm4MoeLiteForCausalLM": ALL_HEADS,
    "Glm4vMoeTextModel": rope(mrope_section=[2, 1, 1], partial_rotary_factor=0.5),
    "Glm5NextTextModel": SPARSE | ALL_HEADS | GLM5,
    "GlmMoeDsaForCausalLM": ALL_HEADS,
    "GptOssForCausalLM": {},
    "GraniteMoeForCausalLM": {},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention"]},
    "GraniteMoeSharedForCausalLM": {},
    "GraniteMoeSWAForCausalLM": {},
    "HunYuanMoEV1ForCausalLM": {},
    "HYV3ForCausalLM": {},
    "HYV4ForCausalLM": ALL_HEADS,
    "Inkling2ForCausalLM": {},
    "InklingForCausalLM": {},
    "JambaForCausalLM": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "JetMoeForCausalLM": {},
    "KimiLinearForCausalLM": HYBRID | ALL_HEADS,
    "Kolibri1ForCausalLM": {},
    "LagunaForCausalLM": {},
    "Lfm2MoeForCausalLM": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "Llama4ForCausalLM": {},
    "LongcatFlashForCausalLM": ALL_HEADS,
    "MellumForCausalLM": {},
    "MiMoV2FlashForCausalLM": {},
    "MiniMaxForCausalLM": {},
    "MiniMaxM2ForCausalLM": {},
    "MiniMaxM3VLForCausalLM": {},
    "Mistral4ForCausalLM": ALL_HEADS | {"head_dim": 32},
    "MistralLarge4TextModel": ALL_HEADS,
    "MixtralForCausalLM": {},
    "MuseSparkTextModel": {},
    "NemotronHForCausalLM": {},
    "NllbMoeForConditionalGeneration": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "OlmoeForCausalLM": {},
    "OpenAIPrivacyFilterForTokenClassification": {},
    "PhimoeForCausalLM": {},
    "Qwen2MoeForCausalLM": {},
    "Qwen3_5MoeForCausalLM": HYBRID,
    "Qwen3MoeForCausalLM": {},
    "Qwen3NextForCausalLM": HYBRID,
    "Qwen3OmniMoeThinkerTextModel": {},
    "Qwen3VLMoeTextModel": {},
    "Qwen4ExpForCausalLM": HYBRID | QWEN4,
    "SolarOpenForCausalLM": {},
    "Step3p7TextModel": SPARSE,
    "SwitchTransformersForConditionalGeneration": {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2},
    "UnlimitedOcrTextModel": ALL_HEADS,
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}


def mixture(name: str, top_k: int = 2) -> nn.Module:
    """A model of the class `name` of transformers with random weights; skips where the release has no such class.

    Of eight experts a token gets `top_k`, or another number where the architecture allows no other.
    """
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    known = kind.config_class()
    sizes = {size: value for size, value in (SIZES | dict.fromkeys(TOP_K, top_k)).items() if _takes(known, size)}
    torch.manual_seed(0)
    model = kind(kind.config_class(**sizes | MIXTURES[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # some are not initialized
                parameter.normal_(0, 0.05)
    return model


def _takes(config: object, size: str) -> bool:
    try:
        return hasattr(config, size)
    except RuntimeError:  # transformers', of a size that differs from layer to layer
        return True
