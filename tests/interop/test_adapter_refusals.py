"""adapter_refusals: what is said where PEFT would leave quantized weights without an adapter."""

import copy
import pickle
import re
import warnings

import pytest
import torch

from bigq import QuantizationConfig, UnsupportedError, load_and_quantize_model
from mixtures import mixture

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers", minversion="5.17", reason="needs experts in one weight")

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
WEIGHTS = ["mlp.w1", "mlp.v1", "mlp.w2"]  # of DBRX: the module around theirs reads them
NAMED = r"names 6 quantized weights that PEFT cannot .*blocks.0.ffn.experts.mlp.w1.*skip_modules=\['mlp'\]"


def quantized(name="DbrxForCausalLM", **settings):
    return load_and_quantize_model(mixture(name), None, QuantizationConfig("nf4", **settings), "cpu")


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


@pytest.mark.parametrize("leaves", [WEIGHTS, ["w1", "v1", "w2"]], ids=["paths", "leaves"])
def test_nothing_else_to_adapt_is_an_error(leaves):
    with pytest.raises(UnsupportedError, match=NAMED):
        adapted(quantized(), target_modules=[], target_parameters=leaves)


def test_weights_that_get_no_adapter_are_named():
    model, said = warned(quantized(), target_modules=["Wqkv"], target_parameters=WEIGHTS)
    assert not of_experts(model)
    (said,) = said
    assert re.search(NAMED, said)


def test_the_weight_of_a_linear_is_adapted_with_the_linear():
    with pytest.raises(UnsupportedError, match=r"as that of a linear does not.*or name linears in target_modules"):
        adapted(quantized("MixtralForCausalLM"), target_modules=[], target_parameters=["q_proj.weight"])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_remedy_helps():
    base = quantized("MixtralForCausalLM", skip_modules=["q_proj"])
    model, said = warned(base, target_modules=[], target_parameters=["q_proj.weight"])
    assert len([name for name, _ in model.named_parameters() if "lora_A" in name]) == 2
    assert said == []
    model(torch.arange(5)[None]).logits.sum().backward()


def test_old_names_of_experts_and_all_linear_adapt_their_weights():
    for settings in ({"target_modules": ["q_proj", "w1", "w2", "w3"]}, {"target_modules": "all-linear"}):
        model, said = warned(quantized("MixtralForCausalLM"), **settings)
        assert len(of_experts(model)) == 4
        assert said == []


def test_weights_that_get_no_adapter_are_named_beside_those_that_do():
    names = [*EXPERTS, "layers.0.self_attn.q_proj.weight"]
    model, said = warned(quantized("MixtralForCausalLM"), target_modules=[], target_parameters=names)
    assert len(of_experts(model)) == 4
    assert "names 1 quantized weights" in said[0]


def test_codes_are_no_target():
    with pytest.raises(UnsupportedError, match=r"gate_up_proj_packed.* hold codes and scales"):
        adapted(
            quantized("MixtralForCausalLM"), target_modules=[], target_parameters=["mlp.experts.gate_up_proj_packed"]
        )


def test_the_second_adapter_is_watched_too_and_on_copies():
    model, _ = warned(quantized(), target_modules=["Wqkv"])
    for held in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(UnsupportedError, match="names 6 quantized weights"):
            held.add_adapter("more", peft.LoraConfig(target_modules=[], target_parameters=WEIGHTS))


def test_a_tuner_over_floats_is_left_alone():
    model, said = warned(mixture("MixtralForCausalLM"), target_modules=["q_proj"], target_parameters=EXPERTS)
    assert len(of_experts(model)) == 4
    assert said == []
    assert not [name for name, value in vars(model.base_model).items() if "bigq" in type(value).__module__]
