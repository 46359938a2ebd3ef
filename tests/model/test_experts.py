"""Which modules hold experts, and which linears are their routers."""

import pytest
import torch
from torch import nn

from bigq import QuantizationConfig, dequantize, load_and_quantize_model
from bigq.formats import Int8
from bigq.model.experts import holds_fused_experts, is_transposed, routers
from bigq.model.selection import select_weights
from bigq.model.tree import ModelTree

TOKENS = torch.arange(9).view(1, 9) * 7
COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


class Stack(nn.Module):
    """As transformers' fused experts say what they are."""

    def __init__(self, experts):
        super().__init__()
        self.num_experts, self.is_transposed = experts, False
        self.up_proj = nn.Parameter(torch.zeros(experts, 8, 8))


def block(experts, **linears):
    return nn.ModuleDict({"experts": experts} | linears)


@pytest.mark.parametrize(
    "experts",
    [
        Stack(4),
        nn.ModuleList(nn.Linear(8, 8) for _ in range(4)),
        nn.ModuleDict({str(i): nn.Linear(8, 8) for i in range(4)}),
        nn.ModuleDict({str(i): nn.Linear(8, 8) for i in range(4)} | {"dropout": nn.Dropout()}),
        nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Identity(), nn.Identity()]),
        nn.ParameterDict({"up": torch.zeros(4, 8, 8), "down": torch.zeros(3, 8, 8), "bias": torch.zeros(6)}),
    ],
    ids=["fused", "ModuleList", "ModuleDict", "dropout", "identities", "stacks of another class"],
)
def test_a_linear_beside_experts_with_an_output_for_each_is_their_router(experts):
    router, gate, other = nn.Linear(8, 4), nn.Linear(8, 1), nn.Linear(8, 6)
    inside = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    shared = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
    model = block(experts, router=router, gate=gate, other=other, inside=inside, shared=shared)
    assert list(routers(model.modules())) == [router, gate, inside[1]]
    kept = select_weights(ModelTree(model), Int8()).kept
    assert {name for name, reason in kept.items() if reason == "the router of experts"} == {
        "router",
        "gate",
        "inside.1",
    }
    named = select_weights(ModelTree(model), Int8(), also_quantize=["router"])
    assert "router.weight" in named.weights


def test_linears_without_experts_beside_them_are_no_routers():
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(8, 2) for _ in range(2)), "a": nn.Linear(8, 2)})
    assert not list(routers(model.modules()))


def mixture(name):
    """A tiny model of transformers, and what else its config needs."""
    transformers = pytest.importorskip("transformers")
    own = {
        "Llama4": ("Llama4TextConfig", {"intermediate_size_mlp": 128, "head_dim": 16, "num_experts_per_tok": 1}),
        "JetMoe": ("JetMoeConfig", {"kv_channels": 16, "num_attention_heads": 4, "num_key_value_heads": 2}),
        "Phimoe": ("PhimoeConfig", {"max_position_embeddings": 128}),
    }
    config, extra = own[name]
    sizes = COMMON | {"intermediate_size": 128, "num_local_experts": 4, "bos_token_id": 1, "eos_token_id": 2} | extra
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 3:  # some are not initialized
                parameter.normal_(0, 0.02)
    return model


@pytest.mark.parametrize("name", ["Llama4", "JetMoe", "Phimoe"])
@pytest.mark.parametrize("weight_format", ["nf4", "int8"])
def test_experts_with_a_forward_of_their_own_are_quantized_and_their_routers_are_not(name, weight_format):
    model = mixture(name)
    stacks = {at for at, module in model.named_modules() if holds_fused_experts(module)}
    assert stacks
    assert all(is_transposed(model.get_submodule(at)) is (name == "Llama4") for at in stacks)
    sizes = {at: parameter.numel() for at, parameter in model.named_parameters()}
    load_and_quantize_model(model, None, QuantizationConfig(weight_format), {"": "cpu"})
    rules = {entry.name: entry.rule for entry in model.quantization_report.modules}
    assert all(rules[at] == "quantized: fused experts" for at in stacks)
    assert [at for at, rule in rules.items() if rule == "the router of experts"]
    outside = ("embed_tokens", "lm_head", *(at for at, rule in rules.items() if rule == "the router of experts"))
    kept = sum(count for at, count in sizes.items() if at.rpartition(".")[0].endswith(outside))
    assert model.quantization_report.quantized_share * sum(sizes.values()) >= 0.97 * (sum(sizes.values()) - kept)
    quantized, exact = model(TOKENS).logits, dequantize(model)(TOKENS).logits
    error = (quantized - exact).norm() / exact.norm()
    assert error < (1e-5 if weight_format == "nf4" else 0.1)  # int8 rounds activations: some go to other experts
