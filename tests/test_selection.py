"""Which linears are quantized: types, patterns, heads, ties."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from bigq import ConfigError
from bigq.selection import match_patterns, output_head, select_linears


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.gate = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.qkv(x)[..., :8]
        if x.requires_grad:
            x = F.linear(x, self.proj.weight)  # read as well as called: quantized, as in BLOOM
        return F.linear(self.proj(x), self.gate.weight, self.gate.bias)  # only read


class Model(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(Attention() for _ in range(layers))
        self.head = nn.Linear(8, 10)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def chosen(model, **kwargs):
    return sorted(select_linears(model, **kwargs).linears)


def test_every_linear_but_the_head_and_what_its_parent_only_reads():
    selection = select_linears(Model())
    assert sorted(selection.linears) == ["layers.0.proj", "layers.0.qkv", "layers.1.proj", "layers.1.qkv"]
    assert selection.kept == {
        "layers.0.gate": "its parent reads its weight directly",
        "layers.1.gate": "its parent reads its weight directly",
        "head": "the output head",
    }


def test_multihead_attention_out_proj_is_left_alone():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    assert chosen(model, defaults=False) == ["a", "b"]


def test_subclasses_are_left_alone():
    class Special(nn.Linear):
        pass

    assert chosen(nn.Sequential(Special(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))) == ["1"]


@pytest.mark.parametrize(
    "pattern, skipped",
    [
        ("layers.1", {"layers.1.qkv", "layers.1.proj"}),
        ("qkv", {"layers.0.qkv", "layers.1.qkv", "layers.10.qkv"}),
        ("layers.*.proj", {"layers.0.proj", "layers.1.proj", "layers.10.proj"}),
        ("layers.0.qkv", {"layers.0.qkv"}),
        ("1", {"layers.1.qkv", "layers.1.proj"}),
        ("q*", {"layers.0.qkv", "layers.1.qkv", "layers.10.qkv"}),
    ],
)
def test_patterns_match_on_component_borders(pattern, skipped):
    model = Model(layers=11)
    lost = set(chosen(model)) - set(chosen(model, skip_modules=[pattern]))
    wanted = {name for name in lost if name.split(".")[1] in ("0", "1", "10")}
    assert wanted == skipped


@pytest.mark.parametrize("pattern, near", [("lm_head", "head"), ("layer.0", r"layers\.0"), ("kv", "qkv")])
def test_a_pattern_that_matches_nothing_is_an_error_with_near_names(pattern, near):
    with pytest.raises(ConfigError, match=rf"skip_modules '{pattern}' matches no .*near: .*{near}"):
        select_linears(Model(), skip_modules=[pattern])


def test_match_patterns_covers_parameters_too():
    assert match_patterns("keep_in_fp32_modules", ["head.bias"], ["head", "head.bias", "head.weight"]) == {
        "head.bias": "head.bias"
    }


class TestOutputHead:
    def test_behind_wrappers(self):
        model = Model()
        wrapper = nn.ModuleDict({"model": nn.Sequential(model)})
        assert output_head(wrapper) is model.head
        assert "model.0.head" not in chosen(wrapper)
        assert "model.0.layers.0.qkv" in chosen(wrapper)

    def test_last_linear_before_an_activation(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.Softmax(dim=-1))
        assert output_head(model) is model[2]

    def test_a_stack_of_blocks_has_none(self):
        body = nn.Module()
        body.embed, body.layers = nn.Embedding(4, 8), nn.ModuleList([Attention(), Attention()])
        assert output_head(body) is None
        assert output_head(nn.Sequential(Attention(), Attention())) is None
        body.layers = nn.ModuleList([Attention()])
        assert output_head(body) is None

    def test_a_single_linear_is_no_head(self):
        assert output_head(nn.Sequential(nn.Linear(4, 4), nn.ReLU())) is None

    def test_the_model_is_asked_first(self):
        model = Model()
        model.get_output_embeddings = lambda: model.layers[0].qkv
        assert output_head(model) is model.layers[0].qkv
        model.get_output_embeddings = lambda: None
        assert output_head(model) is model.head

    def test_a_transformers_base_model_has_none(self):
        model = Model()
        model.base_model_prefix = "model"
        assert output_head(model) is None
        assert output_head(nn.ModuleDict({"model": nn.Linear(2, 2), "classifier": nn.Linear(2, 2)})) is not None


class TestTies:
    def test_a_tied_head_is_skipped(self):
        model = Model()
        model.head = nn.Linear(8, 10, bias=False)
        model.head.weight = model.embed.weight
        assert select_linears(model).kept["head"] == "tied to embed.weight"

    def test_quantizing_one_side_of_a_tie_is_refused(self):
        model = Model()
        model.layers[0].qkv.weight = model.layers[1].qkv.weight
        assert {"layers.0.qkv", "layers.1.qkv"}.isdisjoint(chosen(model))
        with pytest.raises(ConfigError, match=r"layers\.0\.qkv\.weight is tied to layers\.1\.qkv\.weight"):
            select_linears(model, defaults=False)

    def test_one_linear_under_two_names_is_one_entry(self):
        model = Model()
        model.layers[1] = model.layers[0]
        assert select_linears(model).linears == {
            "layers.0.qkv": ("layers.0.qkv", "layers.1.qkv"),
            "layers.0.proj": ("layers.0.proj", "layers.1.proj"),
        }

    def test_ties_survive_init_empty_weights(self, empty, tiny):
        assert select_linears(empty(tiny, tied=True)).kept["head"] == "tied to embed.weight"


def test_the_models_own_fp32_modules_are_skipped():
    model = Model()
    model._keep_in_fp32_modules = ["proj"]
    assert chosen(model) == ["layers.0.qkv", "layers.1.qkv"]
    assert "layers.0.proj" in chosen(model, defaults=False)


def test_keep_in_fp32_modules_are_not_quantized():
    assert chosen(Model(), keep_in_fp32_modules=["layers.0"]) == ["layers.1.proj", "layers.1.qkv"]


def test_a_bare_linear_is_a_model_too():
    assert select_linears(nn.Linear(4, 4)).linears == {"": ("",)}


def test_a_computed_weight_is_left_alone():
    model = Model()
    prune.l1_unstructured(model.layers[0].qkv, "weight", amount=0.5)
    assert select_linears(model).kept["layers.0.qkv"] == "its weight is computed from other parameters"


def test_a_patched_forward_is_left_alone():
    model = Model()
    model.layers[0].qkv.forward = lambda x: x
    assert select_linears(model).kept["layers.0.qkv"] == "its forward is patched"


def test_selection_changes_nothing():
    model = Model()
    before = {name: id(value) for name, value in model.named_modules()}
    select_linears(model, skip_modules=["qkv"])
    assert before == {name: id(value) for name, value in model.named_modules()}
    assert torch.is_grad_enabled()


def test_a_pattern_may_name_a_parameter():
    assert "layers.0.proj" not in chosen(Model(), skip_modules=["layers.0.proj.weight"])
    assert "layers.0.proj" in chosen(Model(), skip_modules=["layers.0.proj.bias"])  # no bias is quantized anyway
