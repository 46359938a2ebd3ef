"""PEFT on quantized models: an adapter that is merged into quantized weights keeps its effect, up to quantization."""

import copy

import pytest
import torch
import transformers
from torch import nn

from bigq import NF4, Int8, QuantizationConfig, QuantizedLinear, load_and_quantize_model
from bigq.weight.linear import QuantizedConv1D

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TARGETS = ["v_proj", "o_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(target_modules=TARGETS, r=4),
    "dora": lambda: peft.LoraConfig(target_modules=TARGETS, r=4, use_dora=True),
    "vera": lambda: peft.VeraConfig(target_modules=["v_proj"], r=4),
    "oft": lambda: peft.OFTConfig(target_modules=TARGETS, r=0, oft_block_size=8),
}
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IDS = torch.arange(18).view(2, 9) * 3 % 64


def llama(weight_format):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    return load_and_quantize_model(model, None, QuantizationConfig(weight_format), "cpu")


def adapted(model, config):
    """`model` with an adapter of random numbers."""
    wrapped = peft.get_peft_model(model, config).eval()
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.7 if "vera_lambda" in name else 0.3 if "oft" in name else 0.2)
    return wrapped


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def distance(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.fixture(params=[NF4(), Int8()], ids=["nf4", "int8"])
def weight_format(request):
    return request.param


@pytest.mark.parametrize("name, safe", [*[(name, False) for name in ADAPTERS], ("lora", True), ("dora", True)])
def test_a_merged_model_is_quantized_and_near_the_adapted_one(name, safe, weight_format):
    base = llama(weight_format)
    plain = logits(base)
    model = adapted(base, ADAPTERS[name]())
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=safe)
    assert {type(layer.self_attn.v_proj) for layer in merged.model.layers} == {QuantizedLinear}
    assert distance(logits(merged), expected) < 0.5 * distance(plain, expected)


def test_an_adapter_trains_and_the_base_does_not_change(weight_format):
    base = llama(weight_format)
    model = adapted(base, ADAPTERS["lora"]())
    before = copy.deepcopy({name: p for name, p in model.named_parameters() if not p.requires_grad})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_a_conv1d_is_merged(weight_format):
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    base = load_and_quantize_model(
        transformers.GPT2LMHeadModel(config).eval(), None, QuantizationConfig(weight_format), "cpu"
    )
    plain = logits(base)
    model = adapted(base, peft.LoraConfig(target_modules=["c_attn", "c_fc"], r=4, fan_in_fan_out=True))
    expected = logits(model)
    model.merge_adapter()
    assert not torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    merged = model.merge_and_unload()
    assert isinstance(merged.transformer.h[0].attn.c_attn, QuantizedConv1D)
    assert distance(logits(merged), expected) < 0.4 * distance(plain, expected)
