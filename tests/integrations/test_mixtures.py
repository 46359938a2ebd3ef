"""Mixtures of experts of every architecture of transformers: what is quantized, what is computed, what is saved."""

import pytest
import torch
from torch import nn

from bigq import QuantizationConfig, QuantizedModule, dequantize, load_and_quantize_model
from mixtures import MIXTURES, mixture

transformers = pytest.importorskip("transformers")

IDS = (torch.arange(9).view(1, 9) * 7 + 3) % 100
# Experts with a forward of their own, transposed or in matrices, and a router of several linears. The others are alike.
QUICK = {"Dbrx", "GptOss", "JetMoe", "Llama4", "LongcatFlash", "Phimoe", "Zaya"}
# Beside tiny experts, positions, mixers of residual streams, and what the model needs in float32 weigh more.
SHARES = {
    "DeepseekV4ForCausalLM": 0.90,
    "Glm5NextTextModel": 0.86,
    "HYV4ForCausalLM": 0.94,
    "Inkling2ForCausalLM": 0.87,
    "InklingForCausalLM": 0.93,
}
each_format = pytest.mark.parametrize("format_name", ["nf4", "int8"])
each_mixture = pytest.mark.parametrize(
    "name",
    [
        name if name.removesuffix("ForCausalLM") in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in MIXTURES
    ],
)


def choosing(name):
    """Whether a weight of this name chooses among experts, or weighs a shared one; some are no linears."""
    return "router" in name or name.endswith((".gate.weight", "expert_gate.weight", ".classifier.weight"))


def logits(model, ids):
    more = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more)[0]


@each_format
@each_mixture
def test_experts_are_quantized_and_routers_are_not(name, format_name):
    model = mixture(name)
    matrices = {own: held for own, held in model.named_parameters() if held.dim() > 1 and not own.endswith("bias")}
    kinds = {own: type(module) for own, module in model.named_modules()}
    load_and_quantize_model(model, None, QuantizationConfig(format_name), "cpu")
    quantized = {
        f"{own}.{leaf}"
        for own, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for leaf in module.descriptions
    }
    rules = {entry.name: entry.rule for entry in model.quantization_report.modules}
    routers = {own for own in matrices if rules[own.rpartition(".")[0]] == "the router of experts" or choosing(own)}
    experts = {own for own in matrices.keys() - routers if "expert" in own}
    assert experts
    assert experts - quantized == set()
    assert routers & quantized == set()
    others = {own for own in matrices if issubclass(kinds[own.rpartition(".")[0]], (nn.Embedding, nn.Conv1d))}
    left_out = routers | others | {"lm_head.weight"}
    counted = {own: tensor.numel() for own, tensor in matrices.items() if own not in left_out}
    share = sum(count for own, count in counted.items() if own in quantized) / sum(counted.values())
    assert share >= SHARES.get(name, 0.97)


@each_format
@each_mixture
def test_it_computes_what_its_weights_say_and_keeps_all_bits_in_a_folder(name, format_name, tmp_path, empty):
    """In int8 each token gets all experts, because activations are rounded: it might go to another one."""
    plain = mixture(name, top_k=8 if format_name == "int8" else 2)
    plain.save_pretrained(tmp_path / "plain")
    config = QuantizationConfig(format_name)
    model, info = type(plain).from_pretrained(tmp_path / "plain", quantization_config=config, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = model.state_dict()
    found = {count: logits(model, IDS[:, :count]) for count in (1, 9)}
    model.save_pretrained(tmp_path / "quantized")

    def skeleton():
        made = empty(lambda: type(plain)(plain.config))
        made.tie_weights()
        return made.eval()

    loads = {
        "the original, without from_pretrained": load_and_quantize_model(skeleton(), tmp_path / "plain", config, "cpu"),
        "the saved one": load_and_quantize_model(skeleton(), tmp_path / "quantized", None, "cpu"),
        "the saved one, with from_pretrained": type(plain).from_pretrained(tmp_path / "quantized"),
    }
    for which, again in loads.items():
        assert again.state_dict().keys() == state.keys(), which
        assert [own for own, tensor in again.state_dict().items() if not torch.equal(tensor, state[own])] == [], which
        assert torch.equal(logits(again, IDS), found[9]), which
    exact = dequantize(model)
    for count, out in found.items():
        expected = logits(exact, IDS[:, :count])
        error = (out - expected).norm() / expected.norm()
        assert error < (1e-5 if format_name == "nf4" else 0.2), count
