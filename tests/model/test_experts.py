"""Which modules hold experts, and which linears are their routers."""

import pytest
import torch
from torch import nn

from bigq import QuantizationConfig, load_and_quantize_model
from bigq.formats import Int8
from bigq.model.experts import expert_weights, holds_experts_in_matrices, is_transposed, routers
from bigq.model.selection import select_weights
from bigq.model.tree import ModelTree
from mixtures import mixture


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


def test_all_linears_of_what_is_called_a_router_choose():
    class TinyRouter(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Linear(8, 3), nn.Linear(3, 5)

    model = nn.ModuleDict({"router_gate": nn.Linear(8, 6), "gate": TinyRouter(), "other": nn.Linear(8, 6)})
    assert list(routers(model.modules())) == [model["router_gate"], model["gate"].down, model["gate"].up]


def test_a_layer_that_is_called_a_router_and_holds_experts_has_a_router():
    class RouterLayer(nn.ModuleDict):
        pass

    layer = RouterLayer({"gate": nn.Linear(8, 4), "experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(4))})
    for model in (nn.ModuleDict({"mlp": layer}), nn.ModuleDict({"routers": nn.ModuleList([layer])})):
        assert list(routers(model.modules())) == [layer["gate"]]


@pytest.mark.parametrize(
    "name, transposed",
    [
        ("InklingForCausalLM", False),
        ("JetMoeForCausalLM", False),
        ("Llama4ForCausalLM", True),
        ("LongcatFlashForCausalLM", False),
        ("Step3p7TextModel", False),
    ],
)
def test_stacks_whose_class_does_not_say_how_they_lie(name, transposed):
    model = mixture(name)
    stacks = [module for module in model.modules() if expert_weights(module)]
    assert {type(module).__name__: is_transposed(module) for module in stacks if not hasattr(module, "is_transposed")}
    assert {is_transposed(module) for module in stacks} == {transposed}
    held = {id(module._parameters[leaf]) for module in stacks for leaf in expert_weights(module)}
    left = [name for name, tensor in model.named_parameters() if tensor.dim() == 3 and id(tensor) not in held]
    assert [name for name in left if "conv1d" not in name] == []


def test_experts_one_below_the_other_are_matrices_of_which_views_stay_quantized():
    model = load_and_quantize_model(mixture("DbrxForCausalLM"), None, QuantizationConfig("nf4"), {"": "cpu"})
    experts = model.transformer.blocks[0].ffn.experts.mlp
    assert holds_experts_in_matrices(experts)
    assert not is_transposed(experts)
    for weight in (experts.w1, experts.v1, experts.w2):
        assert weight.view(8, 96, 64)[torch.tensor(3)].operand().shape == (96, 64)
