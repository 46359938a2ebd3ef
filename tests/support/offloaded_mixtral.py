"""A small Mixtral whose layers, or whose experts, are offloaded, and one that is resident."""

from functools import partial

import pytest
import torch

import bigq
from bigq.weight.experts import QuantizedExperts

E, TOP_K, H = 16, 2, 64
LAYERS = 3
FEW, MANY = E // 2 // TOP_K, E // 2 // TOP_K + 1  # tokens: up to one row for each two experts, and more
ROOM = 1 << 20  # bytes of a cache that has room for all experts


def mixtral(dtype, width=H, inner=96):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(**sizes, **heads, num_local_experts=E, num_experts_per_tok=TOP_K)
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config).to(dtype).eval()


nested_mixtral = partial(mixtral, width=128, inner=128)  # whose experts have whole blocks of 256 scales
NESTED = {"weight_format": bigq.NF4(double_quant=True), "build": nested_mixtral}


def device_map(device, place, part, layers=LAYERS):
    return {"": device} | {f"model.layers.{i}{part}": place for i in range(layers)}


def gpt_oss(dtype):
    """Experts with biases, which are stored transposed."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": H, "intermediate_size": 96, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = transformers.GptOssConfig(**sizes, **heads, num_local_experts=E, num_experts_per_tok=TOP_K)
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).to(dtype).eval()
    for layer in model.model.layers:
        for bias in (layer.mlp.experts.gate_up_proj_bias, layer.mlp.experts.down_proj_bias):
            torch.nn.init.normal_(bias)
    return model


def loaded(
    device="cpu",
    place=None,
    part="",
    weight_format="nf4",
    folder=None,
    dtype=torch.bfloat16,
    layers=LAYERS,
    build=mixtral,
):
    """A Mixtral or another model, with parts of its first `layers` in `place`, or resident and frozen."""
    config = bigq.QuantizationConfig(weight_format)
    places = {"": device} if place is None else device_map(device, place, part, layers)
    model = bigq.load_and_quantize_model(
        build(dtype), None, config, places, offload="quantized", offload_folder=folder, progress=False
    )
    return model.requires_grad_(False)


def ids_of(tokens, device="cpu"):
    return torch.arange(tokens, device=device)[None] * 5 % 64


def logits_of(model, ids, device="cpu"):
    with torch.no_grad():
        return model(ids.to(device), use_cache=False).logits


def logits(model, tokens, device="cpu"):
    return logits_of(model, ids_of(tokens, device), device)


def experts_of(model, layer=0):
    return model.model.layers[layer].mlp.experts


def room_for(model, slots):
    """Bytes of a cache of `slots` experts of each layer."""
    experts = experts_of(model)
    cache = bigq.weight.expert_cache.ExpertCache
    return LAYERS * cache.nbytes_of(experts.cached_specs(slots)[0], slots)


def nbytes_of(module, *, experts):
    return sum(
        tensor.nbytes
        for owner in module.modules()
        for tensor in owner._parameters.values()
        if tensor is not None and (experts or not isinstance(owner, QuantizedExperts))
    )
