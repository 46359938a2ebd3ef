"""Perplexity of real models in every format: no worse than what bitsandbytes makes of the same weights."""

import dataclasses
import importlib.util
import math
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import bigq

FORMATS = {
    "nf4": bigq.QuantizationConfig("nf4"),
    "nf4-double-quant": bigq.QuantizationConfig("nf4", double_quant=True),
    "fp4": bigq.QuantizationConfig("fp4"),
    "int8": bigq.QuantizationConfig("int8", threshold=6.0),
}


@cache
def protocol(assets: Path) -> ModuleType:
    """perplexity.py of the assets: which records are scored, and how."""
    spec = importlib.util.spec_from_file_location("bigq_test_perplexity", assets / "perplexity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bnb() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it is not silent on every CPU
        return pytest.importorskip("bitsandbytes")


def dense_model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def quantized_model(folder: Path, config: bigq.QuantizationConfig) -> LlamaForCausalLM:
    with init_empty_weights():
        skeleton = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    model = bigq.load_and_quantize_model(skeleton, folder, config).eval()
    quantized = [name for name, module in model.named_modules() if isinstance(module, bigq.QuantizedLinear)]
    assert len(quantized) == 7 * model.config.num_hidden_layers
    assert "lm_head" not in quantized
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]


def with_dequantized_weights(folder: Path, quantized: nn.Module) -> nn.Module:
    """The float32 model whose linears hold what the layers of `quantized` stand for."""
    model = dense_model(folder)
    for name, linear in linears(model):
        linear.weight.data = quantized.get_submodule(name).dequantize(torch.float32)
    return model


def their_model(bnb: ModuleType, folder: Path, config: bigq.QuantizationConfig) -> nn.Module:
    """The same model in bitsandbytes.

    For int8 with its own layer; its 4-bit layer decodes some shapes wrongly on a CPU, so 4-bit weights are dequantized.
    """
    model, ours = dense_model(folder), config.weight_format()
    for name, linear in linears(model):
        weight = linear.weight.detach()
        if ours.name == "int8":
            rows, columns = weight.shape
            layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=ours.threshold)
            layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
            model.set_submodule(name, layer.to("cpu").eval())
        else:
            packed, state = bnb.functional.quantize_4bit(
                weight.flatten(), quant_type=ours.name, compress_statistics=ours.double_quant
            )
            linear.weight.data = bnb.functional.dequantize_4bit(packed, state).view(weight.shape)
    return model


def nats(protocol: ModuleType, model: nn.Module, groups: list[list[list[int]]]) -> torch.Tensor:
    """Mean negative log likelihood a token of each group of records."""
    return torch.tensor([math.log(protocol.ppl(model, group)) for group in groups], dtype=torch.float64)


@cache
def stories260k_records(assets: Path) -> list[list[int]]:
    """60 records, 10,865 tokens."""
    tokenizer = protocol(assets).Tok512(assets / "stories260K" / "tok512.bin")
    texts = protocol(assets).STORIES.read_text().split("<|endoftext|>")[:60]
    return [tokenizer.encode(text.strip()[:400]) for text in texts]


@pytest.mark.parametrize("name", FORMATS)
def test_stories260k_sample(assets, bnb, name):
    """60 records through both libraries; the difference is judged by its own standard error."""
    protocol_, records = protocol(assets), stories260k_records(assets)
    groups = [records[start : start + 4] for start in range(0, len(records), 4)]
    tokens = torch.tensor([sum(len(record) - 1 for record in group) for group in groups], dtype=torch.float64)
    share = tokens / tokens.sum()

    folder = assets / "stories260K"
    ours = nats(protocol_, quantized_model(folder, FORMATS[name]), groups)
    theirs = nats(protocol_, their_model(bnb, folder, FORMATS[name]), groups)
    worse = ours - theirs
    mean = (share * worse).sum()
    standard_error = (share**2 * (worse - mean) ** 2).sum().sqrt()
    assert mean <= 3 * standard_error


SEARCHED = ["nf4", "nf4-double-quant", "fp4"]


def searched_changes(protocol, folder, name, records, baseline):
    """Changes in nats a token by absmax, and by a search with moments from random token ids: weights only."""
    moments = bigq.input_moments(dense_model(folder))
    searched = dataclasses.replace(FORMATS[name], method="search", moments=moments)
    models = [with_dequantized_weights(folder, quantized_model(folder, c)) for c in (FORMATS[name], searched)]
    return [math.log(protocol.ppl(model, records) / baseline) for model in models]


def test_a_search_with_random_ids_loses_less_than_absmax(assets):
    """6,000 tokens: .08 and .15 nats a token instead of .11 and .19. The standard error of a change is .006."""
    protocol_, folder = protocol(assets), assets / "stories260K"
    tokenizer = protocol_.Tok512(folder / "tok512.bin")
    texts = protocol_.STORIES.read_text().split("<|endoftext|>")[:34]
    records = [tokenizer.encode(text.strip()[:400]) for text in texts]
    baseline = protocol_.ppl(dense_model(folder), records)
    for name in SEARCHED:
        absmax, searched = searched_changes(protocol_, folder, name, records, baseline)
        assert searched < 0.9 * absmax, name


# What bitsandbytes 0.50.2 makes of the models by the full protocol: change in nats a token, weights only. Its blocks of
# 64 run across rows where a row is no multiple of 64 long and ours end with the row, so ours should be a little better.
FIGURES = {
    "stories260K": {"fp32": 3.4905, "nf4": 0.1081, "nf4-double-quant": 0.1074, "fp4": 0.2131, "int8": 0.0006},
    "stories15M": {"fp32": 2.8602, "nf4": 0.0862, "nf4-double-quant": 0.0866, "fp4": 0.1785, "int8": 0.0005},
}
FIGURE_TOLERANCE = 1e-4  # they are rounded to that; the arithmetic of another CPU is well below it
# And with its LLM.int8() layers, threshold 6, which round the activations too. Another implementation rounds other
# activations: the standard error of the difference is 0.00045 over the 10,865 tokens of the sample above, so a third of
# that over the 90,000 of the protocol, three times which is allowed.
LLM_INT8_FIGURES = {"stories260K": 0.0012, "stories15M": 0.0018}
LLM_INT8_TOLERANCE = 5e-4


@pytest.mark.slow
@pytest.mark.parametrize("model_name", FIGURES)
def test_full_protocol(assets, model_name):
    folder, figures = assets / model_name, FIGURES[model_name]
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"{folder} has no model.safetensors: get_stories15M.py makes it")
    protocol_ = protocol(assets)
    records = protocol_.records(model_name)
    baseline = protocol_.ppl(dense_model(folder), records)
    assert baseline == pytest.approx(figures["fp32"], abs=2e-4)
    for name, config in FORMATS.items():
        model = quantized_model(folder, config)
        if name == "int8":
            change = math.log(protocol_.ppl(model, records) / baseline)
            assert change <= LLM_INT8_FIGURES[model_name] + LLM_INT8_TOLERANCE
        change = math.log(protocol_.ppl(with_dequantized_weights(folder, model), records) / baseline)
        assert change <= figures[name] + FIGURE_TOLERANCE, name


def change_by(protocol_: ModuleType, folder: Path, records: list[list[int]], config: bigq.QuantizationConfig) -> float:
    """The change in nats a token, with the weights as `config` quantizes them and all else in float32."""
    model = with_dequantized_weights(folder, quantized_model(folder, config))
    return math.log(protocol_.ppl(model, records) / protocol_.ppl(dense_model(folder), records))


def test_fit_on_stories260k(assets):
    """At the 5 bits of blocks of 32 (+.0805): with formats that are chosen +.0733, with searched scales too +.0544.

    Random ids are all that both are measured on. With other ids, the first was +.0761.
    """
    folder, protocol_, records = assets / "stories260K", protocol(assets), stories260k_records(assets)
    uniform = change_by(protocol_, folder, records, bigq.QuantizationConfig("nf4", block_size=32))
    model = dense_model(folder)
    searched = bigq.QuantizationConfig("nf4", method="search", moments=bigq.input_moments(model))
    for config, most in ((None, 0.96), (searched, 0.75)):
        found = bigq.fit(model, bits=5.0, config=config)
        assert found.bits <= 5.0
        assert change_by(protocol_, folder, records, found.config) <= most * uniform


FIT_FIGURES = {"kfac": 0.0667, "output": 0.0606}  # blocks of 32, which take 5.0 bits too: +.0758


@pytest.mark.slow
@pytest.mark.parametrize("kind", FIT_FIGURES)
def test_fit_by_the_full_protocol(assets, kind):
    folder = assets / "stories15M"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"{folder} has no model.safetensors: get_stories15M.py makes it")
    found = bigq.fit(dense_model(folder), bits=5.0, sensitivity=kind)
    assert found.bits <= 5.0
    change = change_by(protocol(assets), folder, protocol(assets).records("stories15M"), found.config)
    assert change <= FIT_FIGURES[kind] + 1e-3  # another CPU may choose another layer where two are nearly alike
