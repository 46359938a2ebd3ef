"""Which weights are quantized: types, patterns, heads, ties."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from bigq import FP4, NF4, ConfigError, Int8
from bigq.model.patterns import match_patterns
from bigq.model.selection import Chosen, output_head, select_weights
from bigq.model.tree import ModelTree


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.gate = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.qkv(x)[..., :8]
        if x.requires_grad:
            x = F.linear(x, self.proj.weight)  # read as well as called, as in BLOOM
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


def select(model, **kwargs):
    return select_weights(ModelTree(model), NF4(), **kwargs)


def chosen(model, **kwargs):
    return sorted(select(model, **kwargs).weights)


def weights_of(*names):
    return [f"{name}.weight" for name in names]


def test_every_linear_but_the_head_also_where_its_parent_reads_its_weight():
    selection = select(Model())
    assert sorted(selection.weights) == weights_of(
        "layers.0.gate", "layers.0.proj", "layers.0.qkv", "layers.1.gate", "layers.1.proj", "layers.1.qkv"
    )
    assert selection.kept == {"head": "the output head"}


def test_multihead_attention_out_proj_is_left_alone():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    assert chosen(model, defaults=False) == weights_of("a", "b")
    assert select(model).kept["attn.out_proj"] == "part of nn.MultiheadAttention, whose fused paths need a plain weight"


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Marked(nn.Linear):
    pass


def test_subclasses_with_a_forward_of_their_own_are_quantized_and_the_rule_says_so():
    model = nn.Sequential(Scaled(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    assert chosen(model) == weights_of("0", "1")
    rule = "quantized: a subclass of nn.Linear, which reads it in a forward of its own"
    assert [chosen.rule for chosen in select(model).weights.values()] == [rule, "quantized"]


def test_subclasses_that_compute_as_a_linear_does_are_quantized():
    assert chosen(nn.Sequential(Marked(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))) == weights_of("0", "1")


def test_a_module_whose_name_holds_weight_is_no_weight():
    model = nn.ModuleDict({"weight_net": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    assert chosen(model) == weights_of("weight_net")


def test_skip_modules_adds_to_what_is_kept_by_default():
    second = ("layers.1.gate", "layers.1.proj", "layers.1.qkv")
    assert chosen(Model(), skip_modules=["layers.0"]) == weights_of(*second)
    assert chosen(Model(), skip_modules=["layers.0"], defaults=False) == weights_of("head", *second)


class TestAlsoQuantize:
    def test_the_output_head(self):
        selection = select(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), also_quantize=["1"])
        assert sorted(selection.weights) == weights_of("0", "1")
        assert selection.kept == {}
        assert selection.weights["1.weight"].rule == "quantized: also_quantize '1'"

    def test_an_embedding(self):
        assert "embed.weight" in chosen(Model(), also_quantize=["embed"])

    def test_the_head(self):
        selection = select(Model(), also_quantize=["head"])
        assert "head.weight" in selection.weights
        assert selection.kept == {}

    def test_a_tied_weight_is_one_entry_for_all_of_its_modules(self):
        model = Model()
        model.head = nn.Linear(8, 10, bias=False)
        model.head.weight = model.embed.weight
        for name in ("embed", "head", "head.weight"):
            selection = select(model, also_quantize=[name])
            assert selection.weights["embed.weight"].names == ("embed.weight", "head.weight")
            assert "head.weight" not in selection.weights
            assert selection.kept == {}

    def test_any_matrix_by_its_name_and_no_vector(self):
        model = Model()
        model.table, model.shift = nn.Parameter(torch.zeros(3, 8)), nn.Parameter(torch.zeros(8))
        assert "table" in chosen(model, also_quantize=["table"])
        with pytest.raises(ConfigError, match="also_quantize 'shift' matches no floating-point parameter of two"):
            select(model, also_quantize=["table", "shift"])

    def test_buffers_and_integers_are_none(self):
        model = Model()
        model.register_buffer("grid", torch.zeros(3, 8))
        model.flags = nn.Parameter(torch.zeros(3, 8, dtype=torch.int32), requires_grad=False)
        for name in ("grid", "flags"):
            with pytest.raises(ConfigError, match=f"also_quantize '{name}' matches no floating-point parameter"):
                select(model, also_quantize=[name])

    def test_a_weight_that_one_module_reads_transposed_and_another_does_not(self):
        model = nn.ModuleDict({"a": Experts(True), "b": Experts(False)})
        model["b"].gate_up_proj = model["a"].gate_up_proj
        with pytest.raises(
            ConfigError,
            match=r"a\.gate_up_proj .*is tied to b\.gate_up_proj: one module reads it",
        ):
            select(model, also_quantize=["a.gate_up_proj"])

    def test_what_is_skipped_stays_skipped(self):
        assert "embed.weight" not in chosen(Model(), also_quantize=["embed"], skip_modules=["embed"])
        assert "embed.weight" not in chosen(Model(), also_quantize=["embed"], keep_in_fp32_modules=["embed"])

    def test_a_name_that_is_nowhere(self):
        with pytest.raises(ConfigError, match=r"also_quantize 'embeds' matches no module.*near: embed"):
            select(Model(), also_quantize=["embeds"])


class Experts(nn.Module):
    """As transformers' fused experts say what they are."""

    def __init__(self, is_transposed):
        super().__init__()
        self.num_experts, self.is_transposed = 3, is_transposed
        self.gate_up_proj = nn.Parameter(torch.zeros(3, 8, 16))
        self.down_proj = nn.Parameter(torch.zeros(3, 8, 8))
        self.down_proj_bias = nn.Parameter(torch.zeros(3, 8))


@pytest.mark.parametrize("is_transposed", [False, True])
def test_fused_experts_are_quantized_and_their_biases_are_not(is_transposed):
    model = nn.ModuleDict({"experts": Experts(is_transposed), "a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    assert select_weights(ModelTree(model), Int8()).weights == {
        f"experts.{leaf}": Chosen(
            names=(f"experts.{leaf}",), format=Int8(), transposed=is_transposed, rule="quantized: fused experts"
        )
        for leaf in ("gate_up_proj", "down_proj")
    } | {
        "a.weight": Chosen(names=("a.weight",), format=Int8()),
    }


@pytest.mark.parametrize(
    "pattern, skipped",
    [
        ("layers.1", {"layers.1.qkv", "layers.1.proj", "layers.1.gate"}),
        ("qkv", {"layers.0.qkv", "layers.1.qkv", "layers.10.qkv"}),
        ("layers.*.proj", {"layers.0.proj", "layers.1.proj", "layers.10.proj"}),
        ("layers.0.qkv", {"layers.0.qkv"}),
        ("1", {"layers.1.qkv", "layers.1.proj", "layers.1.gate"}),
        ("q*", {"layers.0.qkv", "layers.1.qkv", "layers.10.qkv"}),
    ],
)
def test_patterns_match_on_component_borders(pattern, skipped):
    model = Model(layers=11)
    lost = set(chosen(model)) - set(chosen(model, skip_modules=[pattern]))
    wanted = {name for name in lost if name.split(".")[1] in ("0", "1", "10")}
    assert wanted == set(weights_of(*skipped))


@pytest.mark.parametrize("pattern, near", [("lm_head", "head"), ("layer.0", r"layers\.0"), ("kv", "qkv")])
def test_a_pattern_that_matches_nothing_is_an_error_with_near_names(pattern, near):
    with pytest.raises(ConfigError, match=rf"skip_modules '{pattern}' matches no .*near: .*{near}"):
        select(Model(), skip_modules=[pattern])


def test_match_patterns_covers_parameters_too():
    assert match_patterns("keep_in_fp32_modules", ["head.bias"], ["head", "head.bias", "head.weight"]) == {
        "head.bias": "head.bias"
    }


class TestOutputHead:
    def test_behind_wrappers(self):
        model = Model()
        wrapper = nn.ModuleDict({"model": nn.Sequential(model)})
        assert output_head(wrapper) is model.head
        assert "model.0.head.weight" not in chosen(wrapper)
        assert "model.0.layers.0.qkv.weight" in chosen(wrapper)

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

        def missing():
            raise NotImplementedError

        model.get_output_embeddings = missing
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
        assert select(model).kept["head"] == "tied to embed.weight"

    def test_quantizing_one_side_of_a_tie_is_refused(self):
        model = Model()
        model.layers[0].qkv.weight = model.layers[1].qkv.weight
        assert {"layers.0.qkv.weight", "layers.1.qkv.weight"}.isdisjoint(chosen(model))
        with pytest.raises(ConfigError, match=r"layers\.0\.qkv\.weight is tied to layers\.1\.qkv\.weight"):
            select(model, defaults=False)

    def test_one_linear_under_two_names_is_one_entry(self):
        model = Model()
        model.layers[1] = model.layers[0]
        assert {name: weight.names for name, weight in select(model).weights.items()} == {
            f"layers.0.{leaf}.weight": (f"layers.0.{leaf}.weight", f"layers.1.{leaf}.weight")
            for leaf in ("qkv", "proj", "gate")
        }

    def test_ties_survive_init_empty_weights(self, empty, tiny):
        assert select(empty(tiny, tied=True)).kept["head"] == "tied to embed.weight"


def test_the_models_own_fp32_modules_are_skipped():
    model = Model()
    model._keep_in_fp32_modules = ["proj"]
    assert chosen(model) == weights_of("layers.0.gate", "layers.0.qkv", "layers.1.gate", "layers.1.qkv")
    assert "layers.0.proj.weight" in chosen(model, defaults=False)


def test_keep_in_fp32_modules_are_not_quantized():
    assert chosen(Model(), keep_in_fp32_modules=["layers.0"]) == weights_of(
        "layers.1.gate", "layers.1.proj", "layers.1.qkv"
    )


def test_a_bare_linear_is_a_model_too():
    assert select(nn.Linear(4, 4)).weights == {"weight": Chosen(names=("weight",), format=NF4())}


def test_a_computed_weight_is_left_alone():
    model = Model()
    prune.l1_unstructured(model.layers[0].qkv, "weight", amount=0.5)
    assert select(model).kept["layers.0.qkv"] == "its weight is computed from other parameters"


def test_a_patched_forward_is_left_alone():
    model = Model()
    model.layers[0].qkv.forward = lambda x: x
    assert select(model).kept["layers.0.qkv"] == "its forward is patched"


def test_selection_changes_nothing():
    model = Model()
    before = {name: id(value) for name, value in model.named_modules()}
    select(model, skip_modules=["qkv"])
    assert before == {name: id(value) for name, value in model.named_modules()}
    assert torch.is_grad_enabled()


def test_a_pattern_may_name_a_parameter():
    assert "layers.0.proj.weight" not in chosen(Model(), skip_modules=["layers.0.proj.weight"])
    assert "layers.0.proj.weight" in chosen(Model(), skip_modules=["layers.0.proj.bias"])  # no bias is quantized anyway


def test_a_linear_that_says_is_transposed_is_no_fused_experts():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].is_transposed = True
    assert not any(weight.transposed for weight in select_weights(ModelTree(model), NF4()).weights.values())


def test_a_scripted_module_cannot_be_named():
    model = nn.Sequential(nn.Linear(64, 64), torch.jit.script(nn.Linear(64, 64)))
    with pytest.raises(ConfigError, match="ScriptModule"):
        select(model, also_quantize=["1"])


FP4_, INT8 = FP4(), Int8()


def formats(model, rules, default=None, **kwargs):
    selection = select_weights(ModelTree(model), default, rules=tuple(rules.items()), **kwargs)
    return {name.removesuffix(".weight"): chosen.format.name for name, chosen in selection.weights.items()}


def test_the_first_rule_that_matches_says_the_format():
    rules = {"layers.0.proj": INT8, "re:.*\\.(proj|gate)": FP4_, "layers.1": None}
    assert formats(Model(), rules, NF4()) == {
        "layers.0.qkv": "nf4",
        "layers.0.proj": "int8",
        "layers.0.gate": "fp4",
        "layers.1.proj": "fp4",
        "layers.1.gate": "fp4",
    }
    assert formats(Model(), dict(reversed(rules.items())), NF4()) == {
        "layers.0.qkv": "nf4",
        "layers.0.proj": "fp4",
        "layers.0.gate": "fp4",
    }


def test_without_a_format_only_what_rules_name_is_quantized():
    selection = select_weights(ModelTree(Model()), None, rules=(("*.proj", INT8), ("layers.0.proj", None)))
    assert {name: chosen.rule for name, chosen in selection.weights.items()} == {
        "layers.0.proj.weight": "rules '*.proj'",
        "layers.1.proj.weight": "rules '*.proj'",
    }
    assert selection.kept["layers.0.qkv"] == "no rule matches it"
    assert selection.kept["head"] == "the output head"


@pytest.mark.parametrize(
    "pattern, quantized",
    [
        pytest.param("head", {"head"}, id="module"),
        pytest.param("head.weight", {"head"}, id="parameter"),
        pytest.param("re:head", {"head"}, id="regex"),
        pytest.param("emb*d", {"embed"}, id="glob"),
        pytest.param("*", {"layers.0.qkv", "layers.0.proj", "layers.0.gate"}, id="all"),
        pytest.param("re:.*", {"layers.0.qkv", "layers.0.proj", "layers.0.gate"}, id="all-by-regex"),
        pytest.param("layers", {"layers.0.qkv", "layers.0.proj", "layers.0.gate"}, id="list"),
    ],
)
def test_a_rule_quantizes_what_is_kept_by_default_only_if_it_names_it(pattern, quantized):
    assert set(formats(Model(layers=1), {pattern: INT8})) == quantized


def test_a_rule_that_keeps_wins_over_defaults_and_skips_win_over_rules():
    model = Model(layers=1)
    assert set(formats(model, {"layers.0.qkv": None}, NF4())) == {"layers.0.proj", "layers.0.gate"}
    kept = formats(model, {"layers.0.qkv": INT8, "head": INT8}, NF4(), skip_modules=["qkv", "head"])
    assert set(kept) == {"layers.0.proj", "layers.0.gate"}


def test_a_tied_weight_has_the_first_rule_of_its_names():
    model = Model(layers=1)
    model.head.weight = model.embed.weight
    chosen = select_weights(ModelTree(model), NF4(), rules=(("head", INT8), ("embed", FP4_))).weights["embed.weight"]
    assert (chosen.format, set(chosen.names)) == (INT8, {"embed.weight", "head.weight"})


def test_a_rule_that_matches_nothing_is_refused_with_near_names():
    with pytest.raises(ConfigError, match=r"rules 'layers.0.pro' matches no module.*near: layers.0.proj"):
        formats(Model(), {"layers.0.pro": INT8}, NF4())
    with pytest.raises(ConfigError, match=r"rules 're:proj' matches no module"):
        formats(Model(), {"re:proj": INT8}, NF4())
