"""Adapters of PEFT that start from the weight: PiSSA, OLoRA, KaSA and CorDA change it, EVA and LoRA-GA look at data."""

import warnings

import pytest
import torch

from bigq import NF4, Int8, QuantizedModule, UnsupportedError, dequantize_tensor, quantize_tensor
from dequantized import dequantized

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from adapted import distance, float_twin, logits, moved, quantized, state, tuned  # noqa: E402  # it imports peft
from tuners import IDS, STARTS, llama, lora  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture(params=[NF4(), Int8()], ids=["nf4", "int8"])
def weight_format(request):
    return request.param


def bases(model):
    return {path: module for path, module in model.named_modules() if path.endswith("base_layer")}


def assert_residual_is_quantized(model, twin, weight_format):
    """The base weights are those of the float twin, quantized."""
    assert bases(model).keys() == bases(twin).keys() != set()
    for path, module in bases(model).items():
        assert isinstance(module, QuantizedModule)
        expected = dequantize_tensor(quantize_tensor(bases(twin)[path].weight.detach(), weight_format))
        assert distance(module.dequantize(), expected) < 1e-6, path


@pytest.mark.parametrize("name", STARTS)
def test_the_base_becomes_the_quantized_residual(name, weight_format, tmp_path):
    model = tuned(quantized(weight_format), STARTS[name]())
    twin = tuned(dequantized(quantized(weight_format), llama()), STARTS[name]())
    assert_residual_is_quantized(model, twin, weight_format)
    if name != "kasa":  # which drops a part of the weight for good, in float weights too
        quantization = distance(logits(quantized(weight_format)), logits(llama()))
        assert distance(logits(model), logits(quantized(weight_format))) < 1.5 * quantization
    # A saved adapter fits the base that PEFT computes again from the same quantized model.
    moved(model).save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(quantized(weight_format), tmp_path)), logits(model))


@pytest.mark.parametrize("name", STARTS)
def test_the_residual_comes_back_after_a_merge(name, weight_format):
    model = moved(tuned(quantized(weight_format), STARTS[name]()))
    before, expected = state(model), logits(model)
    model.merge_adapter()
    assert distance(logits(model), expected) < 1.5 * distance(logits(quantized(weight_format)), logits(llama()))
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[key]) for key, tensor in state(model).items())
    assert torch.equal(logits(model), expected)


def test_the_fast_svd_of_pissa_is_random(tmp_path):
    """PEFT draws other numbers when it loads, for float weights too: the adapter does not fit the base any more."""
    distances = {}
    for kind, base in {"float": llama, "nf4": lambda: quantized(NF4())}.items():
        model = moved(tuned(base(), lora(init_lora_weights="pissa_niter_8")))
        model.save_pretrained(tmp_path / kind)
        again = peft.PeftModel.from_pretrained(base(), tmp_path / kind)
        distances[kind] = distance(logits(again), logits(model))
    assert distances["float"] > 0.1
    assert distances["nf4"] > 0.1


def test_corda(weight_format):
    pytest.importorskip("attr", reason="PEFT's CorDA needs attrs")
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    def start(base):
        config = lora(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))

        @torch.no_grad()
        def run():
            for row in IDS:
                base(input_ids=row[None])

        preprocess_corda(base, config, run_model=run)
        return tuned(base, config)

    base = quantized(weight_format)
    expected = logits(base)
    model = start(base)
    twin = float_twin(model, lora(), weight_format)  # CorDA's adapter on the weights before it
    for path, module in bases(model).items():
        layer = path.removesuffix(".base_layer")
        residual = bases(twin)[path].weight.detach() - model.get_submodule(layer).get_delta_weight("default").detach()
        assert distance(module.dequantize(), dequantize_tensor(quantize_tensor(residual, weight_format))) < 1e-6
    quantization = distance(expected, logits(llama()))
    assert distance(logits(model), expected) < 1.5 * quantization


@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False")
def test_eva_takes_the_directions_of_the_activations(weight_format):
    def start(base):
        model = tuned(base, lora(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0)))
        peft.initialize_lora_eva_weights(model, dataloader=[{"input_ids": IDS}] * 8, show_progress_bar=False)
        return {name: p.detach() for name, p in model.named_parameters() if "lora_A" in name}

    found, expected = start(quantized(weight_format)), start(dequantized(quantized(weight_format), llama()))
    for name, directions in found.items():
        cosines = torch.nn.functional.cosine_similarity(directions, expected[name]).abs()
        assert cosines.min() > (0.999 if weight_format == NF4() else 0.9), name


def test_lora_ga_needs_gradients_of_the_weights_and_says_so(weight_format):
    from peft.tuners.lora.loraga import preprocess_loraga

    config = lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    with pytest.raises(ValueError, match="LoRA-GA does not support quantized models"):
        preprocess_loraga(quantized(weight_format), config, lambda: None)


def test_loftq_is_refused_with_what_to_do(weight_format):
    config = lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4))
    with pytest.raises(UnsupportedError, match=r"'loftq' starts .* use 'olora', 'pissa'"):
        tuned(quantized(weight_format), config)


def test_loftq_would_start_with_zeros():
    """bitsandbytes, with which PEFT computes it, quantizes the numbers of an NF4 weight to the same numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it is not silent on every CPU
        bnb = pytest.importorskip("bitsandbytes")
    for module in bases(tuned(quantized(NF4()), lora())).values():
        weight = module.dequantize()
        codes = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        assert torch.equal(bnb.functional.dequantize_4bit(*codes), weight)
