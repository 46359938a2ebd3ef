"""adapter_refusals: what is said where PEFT would leave quantized weights without an adapter."""

import copy
import pickle
import re
import warnings

import pytest
import torch

from bigq import QuantizationConfig, UnsupportedError, load_and_quantize_model

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers", minversion="5.17", reason="needs experts in one weight")

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
NAMED = r"names 4 quantized weights that PEFT cannot .*layers.0.mlp.experts.gate_up_proj.*skip_modules=\['experts'\]"


def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_attention_heads=2, num_key_value_heads=2, num_local_experts=3)
    return transformers.MixtralForCausalLM(config)


def quantized(implementation="eager", **settings):
    """With an implementation of transformers that multiplies each expert on its own, which takes no adapters."""
    model = load_and_quantize_model(mixtral(), None, QuantizationConfig("nf4", **settings), "cpu")
    model.set_experts_implementation(implementation)
    return model


def adapted(model, **settings):
    return peft.get_peft_model(model, peft.LoraConfig(r=4, **settings))


def warned(model, **settings):
    """The adapted model, and what bigq has warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = adapted(model, **settings)
    return model, [str(warning.message) for warning in caught if "quantized" in str(warning.message)]


def of_experts(model):
    return [name for name, _ in model.named_parameters() if "lora_A" in name and "experts" in name]


@pytest.mark.parametrize("leaves", [EXPERTS, ["gate_up_proj", "down_proj"]], ids=["paths", "leaves"])
def test_nothing_else_to_adapt_is_an_error(leaves):
    with pytest.raises(UnsupportedError, match=NAMED):
        adapted(quantized(), target_modules=[], target_parameters=leaves)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
        {"target_modules": ["q_proj", "w1", "w2", "w3"]},
        {"target_modules": "all-linear"},
    ],
    ids=["named", "old-names", "all-linear"],
)
def test_experts_that_get_no_adapter_are_named(settings):
    """PEFT turns the names of old experts, and "all-linear", into names of parameters."""
    model, said = warned(quantized(), **settings)
    assert not of_experts(model)
    (said,) = said
    assert re.search(NAMED, said)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_remedy_helps():
    model, said = warned(quantized(skip_modules=["experts"]), target_modules=["q_proj"], target_parameters=EXPERTS)
    assert len(of_experts(model)) == 4
    assert said == []
    model(torch.arange(5)[None]).logits.sum().backward()


def test_old_names_of_experts_and_all_linear_adapt_their_weights():
    for settings in ({"target_modules": ["q_proj", "w1", "w2", "w3"]}, {"target_modules": "all-linear"}):
        model, said = warned(quantized("grouped_mm"), **settings)
        assert len(of_experts(model)) == 4
        assert said == []


def test_weights_that_get_no_adapter_are_named_beside_those_that_do():
    model = quantized("grouped_mm")
    model.model.layers[0].mlp.experts.config = copy.deepcopy(model.config)
    model.model.layers[0].mlp.experts.config._experts_implementation = "eager"
    model, said = warned(model, target_modules=[], target_parameters=EXPERTS)
    assert len(of_experts(model)) == 2
    assert "names 2 quantized weights" in said[0]


def test_codes_are_no_target():
    with pytest.raises(UnsupportedError, match=r"gate_up_proj_packed.* hold codes and scales"):
        adapted(quantized("grouped_mm"), target_modules=[], target_parameters=["mlp.experts.gate_up_proj_packed"])


def test_the_second_adapter_is_watched_too_and_on_copies():
    model, _ = warned(quantized(), target_modules=["q_proj"])
    for held in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(UnsupportedError, match="names 4 quantized weights"):
            held.add_adapter("more", peft.LoraConfig(target_modules=[], target_parameters=EXPERTS))


def test_a_tuner_over_floats_is_left_alone():
    model, said = warned(mixtral(), target_modules=["q_proj"], target_parameters=EXPERTS)
    assert len(of_experts(model)) == 4
    assert said == []
    assert not [name for name, value in vars(model.base_model).items() if "bigq" in type(value).__module__]
