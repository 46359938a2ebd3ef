"""method="search" behind from_pretrained, and files of searched scales as bitsandbytes reads them."""

import json
import warnings

import pytest
import torch

import bigq
from bigq import ConfigError, QuantizationConfig, input_moments, load_and_quantize_model

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
FORMATS = {
    "nf4": bigq.NF4(),
    "nf4-double-quant": bigq.NF4(double_quant=True),
    "fp4": bigq.FP4(block_size=32),
    "fp4-double-quant": bigq.FP4(double_quant=True),
}


def llama():
    torch.manual_seed(0)
    settings = {**SMALL, "intermediate_size": 320, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).bfloat16().eval()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(folder of a model, its moments)."""
    folder = tmp_path_factory.mktemp("llama")
    model = llama()
    model.save_pretrained(folder)
    return folder, input_moments(model)


def assert_same_state(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double-quant"])
def test_from_pretrained_searches_saves_and_reloads(measured, double_quant, tmp_path):
    folder, moments = measured
    config = QuantizationConfig("nf4", double_quant=double_quant, method="search", moments=moments)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert_same_state(model, load_and_quantize_model(llama(), None, config, device_map="cpu"))
    assert (model.model.layers[0].mlp.up_proj.absmax < 0).any()
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["method"] == "search"
    assert "moments" not in said
    assert_same_state(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), model)
    bare = QuantizationConfig("nf4", method="search")
    with pytest.raises(ConfigError, match=r"pass moments=bigq\.input_moments"):
        transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=bare)


def test_diffusers_from_pretrained_searches(tmp_path):
    pytest.importorskip("diffusers")
    from diffusion_models import dit, run, state

    torch.manual_seed(0)
    model = dit().eval()
    model.save_pretrained(tmp_path)
    shape = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([1, 9])}
    moments = input_moments(model, [{**shape, "class_labels": torch.tensor([1, 2])}])
    config = QuantizationConfig("nf4", method="search", moments=moments)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config)
    ours = load_and_quantize_model(model, None, config, device_map="cpu")
    assert all(torch.equal(tensor, state(ours)[name]) for name, tensor in state(loaded).items())
    assert torch.equal(run(loaded), run(ours))
    loaded.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(tensor, state(ours)[name]) for name, tensor in state(again).items())


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS.keys())
def test_bitsandbytes_decodes_searched_scales_exactly(measured, weight_format, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it is not silent on every CPU
        bnb = pytest.importorskip("bitsandbytes")
    _, moments = measured
    config = QuantizationConfig(weight_format, compute_dtype="bf16", method="search", moments=moments)
    ours = load_and_quantize_model(llama(), None, config, device_map="cpu")
    bigq.save_quantized(ours, tmp_path, layout="bitsandbytes")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    compared = 0
    for name, module in ours.named_modules():
        if isinstance(module, bigq.QuantizedLinear):
            own = theirs.get_submodule(name).weight
            assert type(own) is bnb.nn.Params4bit
            decoded = bnb.functional.dequantize_4bit(own.data, own.quant_state)
            assert torch.equal(module.weight.dequantize(), decoded), name
            assert weight_format.name == "fp4" or (module.absmax < 0).any()
            compared += 1
    assert compared == 7
    again = load_and_quantize_model(llama(), tmp_path, None, device_map="cpu", progress=False)
    assert_same_state(again, ours)
    with torch.no_grad():
        found, expected = (model(torch.arange(9)[None]).logits for model in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)
