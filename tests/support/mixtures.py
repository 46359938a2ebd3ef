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

ALL_HEADS = {"num_key_value_heads": 4}
SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
DBRX = {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 8, "moe_top_k": 2}

# {class of the model: what its config needs besides SIZES}
MIXTURES = {
    "AfmoeForCausalLM": {},
    "AriaTextForCausalLM": {},
    "BailingHybridForCausalLM": HYBRID | ALL_HEADS,
    "Cohere2MoeForCausalLM": {},
    "DbrxForCausalLM": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}, "ffn_config": DBRX},
    "DeepseekV2ForCausalLM": ALL_HEADS,
    "DeepseekV3ForCausalLM": ALL_HEADS,
    "DeepseekV32ForCausalLM": ALL_HEADS,
    "Dots1ForCausalLM": {},
    "Ernie4_5_MoeForCausalLM": {},
    "ExaoneMoeForCausalLM": {},
    "FlexOlmoForCausalLM": {},
    "Glm4MoeForCausalLM": {},
    "Glm4MoeLiteForCausalLM": ALL_HEADS,
    "GlmMoeDsaForCausalLM": ALL_HEADS,
    "GptOssForCausalLM": {},
    "GraniteMoeForCausalLM": {},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention"]},
    "GraniteMoeSharedForCausalLM": {},
    "HunYuanMoEV1ForCausalLM": {},
    "HYV3ForCausalLM": {},
    "InklingForCausalLM": {},
    "JambaForCausalLM": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "JetMoeForCausalLM": {},
    "KimiLinearForCausalLM": HYBRID | ALL_HEADS,
    "LagunaForCausalLM": {},
    "Lfm2MoeForCausalLM": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "Llama4ForCausalLM": {},
    "LongcatFlashForCausalLM": ALL_HEADS,
    "MiMoV2FlashForCausalLM": {},
    "MiniMaxForCausalLM": {},
    "MiniMaxM2ForCausalLM": {},
    "MiniMaxM3VLForCausalLM": {},
    "MixtralForCausalLM": {},
    "NemotronHForCausalLM": {},
    "NllbMoeForConditionalGeneration": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "OlmoeForCausalLM": {},
    "PhimoeForCausalLM": {},
    "Qwen2MoeForCausalLM": {},
    "Qwen3MoeForCausalLM": {},
    "Qwen3NextForCausalLM": HYBRID,
    "Qwen3VLMoeTextModel": {},
    "Qwen3_5MoeForCausalLM": HYBRID,
    "SolarOpenForCausalLM": {},
    "Step3p7TextModel": SPARSE,
    "SwitchTransformersForConditionalGeneration": {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2},
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
    sizes = {size: value for size, value in (SIZES | dict.fromkeys(TOP_K, top_k)).items() if hasattr(known, size)}
    torch.manual_seed(0)
    model = kind(kind.config_class(**sizes | MIXTURES[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # some are not initialized
                parameter.normal_(0, 0.05)
    return model
