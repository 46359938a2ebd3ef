"""The shapes of three mixtures of experts, and tiny ones for a check on the CPU."""

from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

TINY = {
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
}


def qwen3(tiny=False):
    own = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    if tiny:
        own |= TINY | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return Qwen3MoeForCausalLM, Qwen3MoeConfig(**own)


def mixtral(tiny=False):
    own = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}  # its other defaults are those of 8x7B
    if tiny:
        own |= TINY | {"intermediate_size": 128}
    return MixtralForCausalLM, MixtralConfig(**own)


def gptoss(tiny=False):
    own = {"num_hidden_layers": 24, "num_local_experts": 32}  # its other defaults are those of the 120b, as of the 20b
    if tiny:
        own |= TINY | {"num_local_experts": 8, "intermediate_size": 128}
    return GptOssForCausalLM, GptOssConfig(**own)


NAMES = {"qwen3": "Qwen3-30B-A3B", "mixtral": "Mixtral-8x7B", "gptoss": "gpt-oss-20b"}
SHAPES = {"qwen3": qwen3, "mixtral": mixtral, "gptoss": gptoss}
