"""Whole models: loaded, saved, reloaded and offloaded, they compute what their dequantized weights compute."""

import copy
from itertools import product

import pytest
import torch
from accelerate import Accelerator, init_empty_weights
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from bigq import FP4, NF4, Int8, QuantizationConfig, QuantizedModule, load_and_quantize_model, num_parameters
from dequantized import dequantized

transformers = pytest.importorskip("transformers")
FORMATS = {"nf4": NF4(), "nf4-double": NF4(double_quant=True), "fp4": FP4(block_size=32), "int8": Int8()}


class Experts(nn.Module):
    """Two stacks of matrices, read one by one and all at once."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 40, 71) / 8)
        self.down = nn.Parameter(torch.randn(3, 71, 40) / 8)

    def forward(self, x):
        up = torch.stack([F.linear(x, self.up[e]) for e in range(3)])
        return torch.bmm(torch.relu(up), self.down.transpose(1, 2)).mean(0)


class Parent(nn.Module):
    """A parent that reads the weight of its linear."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(71, 71)

    def forward(self, x):
        return F.linear(x, self.inner.weight[:40]) @ self.inner.weight[:40] + self.inner.bias


class Model(nn.Module):
    """An embedding, experts, a parent that reads, an attention, and a head."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(50, 71)
        self.experts = Experts()
        self.parent = Parent()
        self.norm = nn.LayerNorm(71)
        self.head = nn.Linear(71, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.experts(x.flatten(0, 1)).view(x.shape)
        return self.head(self.norm(x + self.parent(x)))


IDS = torch.arange(14).view(2, 7) * 3


def quantized_weights(model):
    return {
        f"{path}.{leaf}"
        for path, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for leaf in module.descriptions
    }


def assert_near(got, expected, weight_format):
    """Int8 quantizes the activations too."""
    assert got.shape == expected.shape
    assert (got - expected).norm() <= (0.03 if weight_format.name == "int8" else 1e-5) * expected.norm()


def same_state(model, other):
    state, others = model.state_dict(), other.state_dict()
    return state.keys() == others.keys() and all(torch.equal(state[name], others[name]) for name in state)


def skeleton(make, *args, **kwargs):
    with init_empty_weights():
        return make(*args, **kwargs)


@pytest.fixture(params=FORMATS.values(), ids=FORMATS)
def weight_format(request):
    return request.param


NAMED = ("embed", "experts", "head")


@torch.no_grad()
def test_named_weights_are_the_same_from_a_file_in_place_and_saved(weight_format, tmp_path):
    plain, config = Model(), QuantizationConfig(weight_format, also_quantize=NAMED)
    (tmp_path / "plain").mkdir()
    save_file(plain.state_dict(), tmp_path / "plain" / "model.safetensors")
    model = load_and_quantize_model(skeleton(Model), tmp_path / "plain", config, "cpu")
    assert quantized_weights(model) == {
        "embed.weight", "experts.up", "experts.down", "parent.inner.weight", "head.weight"
    }  # fmt: skip
    in_place = load_and_quantize_model(copy.deepcopy(plain), None, config, "cpu")
    assert same_state(model, in_place)
    out = model(IDS)
    assert_near(out, dequantized(model, copy.deepcopy(plain))(IDS), weight_format)
    assert num_parameters(model) == num_parameters(plain)
    Accelerator().save_model(model, tmp_path / "saved")
    again = load_and_quantize_model(skeleton(Model), tmp_path / "saved", device_map="cpu")
    assert same_state(again, model)
    assert torch.equal(again(IDS), out)


@torch.no_grad()
def test_an_offloaded_weight_computes_what_a_resident_one_does(weight_format, tmp_path):
    plain, config = Model(), QuantizationConfig(weight_format, also_quantize=NAMED)
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    expected = load_and_quantize_model(skeleton(Model), tmp_path, config, "cpu")(IDS)
    for on_disk in ("embed", "experts", "parent.inner", "parent", "head"):
        offloaded = load_and_quantize_model(
            skeleton(Model),
            tmp_path,
            config,
            {"": "cpu", on_disk: "disk"},
            offload="quantized",
            offload_folder=tmp_path / "offload",
        )
        for _ in range(2):
            assert torch.equal(offloaded(IDS), expected), on_disk


@torch.no_grad()
def test_a_tied_weight_that_is_named_is_quantized_once_for_all_its_modules(weight_format, tmp_path):
    plain = Model(tied=True)
    config = QuantizationConfig(weight_format, also_quantize=["embed"], skip_modules=["experts"])
    model = load_and_quantize_model(copy.deepcopy(plain), None, config, "cpu")
    for part in weight_format.state_spec((50, 71)):
        name = f"weight_{part}"
        assert model.head.get_parameter(name) is model.embed.get_parameter(name)
    assert torch.equal(model.embed(IDS), model.head.weight.dequantize()[IDS])
    out = model(IDS)
    assert num_parameters(model) == num_parameters(plain)
    assert_near(out, dequantized(model, plain)(IDS), weight_format)
    Accelerator().save_model(model, tmp_path / "saved")
    assert len([name for name in load_file(tmp_path / "saved" / "model.safetensors") if "weight_packed" in name]) == 2
    again = skeleton(Model)
    again.head.weight = again.embed.weight
    again = load_and_quantize_model(again, tmp_path / "saved", device_map="cpu")
    assert again.head.weight_packed is again.embed.weight_packed
    assert torch.equal(again(IDS), out)


# torch's own transformer, which reads the weights of its children


def encoder(**settings):
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, **settings), 2).eval()


@pytest.mark.parametrize("named", [[], ["in_proj_weight"], ["self_attn"]], ids=["linears", "in_proj", "attention"])
@pytest.mark.parametrize("settings", [{}, {"activation": "gelu", "norm_first": True}], ids=["post-norm", "pre-norm"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_takes_masks_on_every_path(settings, named):
    plain = encoder(**settings)
    config = QuantizationConfig(NF4(), also_quantize=named)
    model = load_and_quantize_model(copy.deepcopy(plain), None, config, "cpu")
    assert len(quantized_weights(model)) == 2 * (2 + (len(named) if named != ["self_attn"] else 2))
    dequantized(model, plain)
    x, padded = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padded[0, 3:] = padded[2, 1:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                model(x, mask=causal, is_causal=True), plain(x, mask=causal, is_causal=True), rtol=1e-4, atol=1e-5
            )
            got, expected = (each(x, src_key_padding_mask=padded)[~padded] for each in (model, plain))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


ATTENTIONS = {
    "self": ({}, ["in_proj_weight"]),
    "with out_proj": ({}, ["in_proj_weight", "out_proj"]),
    "other widths": ({"kdim": 20, "vdim": 20}, ["q_proj_weight", "k_proj_weight", "v_proj_weight"]),
}


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_an_attention_gives_its_output_and_its_weights(kind, weight_format):
    settings, named = ATTENTIONS[kind]
    plain = nn.MultiheadAttention(16, 2, batch_first=True, **settings).eval()
    config = QuantizationConfig(weight_format, also_quantize=named)
    model = load_and_quantize_model(copy.deepcopy(plain), None, config, "cpu")
    assert isinstance(model, nn.MultiheadAttention)
    assert len(quantized_weights(model)) == len(named)
    dequantized(model, plain)
    query, key = torch.randn(3, 5, 16), torch.randn(3, 4, settings.get("kdim", 16))
    calls = [(query, key, key), *([] if settings else [(query, query, query)])]
    for call, need_weights in product(calls, (True, False)):
        with torch.no_grad():
            (out, weights), (expected, expected_weights) = (
                each(*call, need_weights=need_weights) for each in (model, plain)
            )
        assert_near(out, expected, weight_format)
        assert (weights is None) == (expected_weights is None) == (not need_weights)
        if need_weights:
            assert_near(weights, expected_weights, weight_format)


# transformers

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, **TOKENS}
FALCON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {  # class, arguments of its config, also_quantize, how many weights are quantized
    "Mixtral": ({**SMALL, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}, (), 12),
    "Qwen3Moe": (
        {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 3, "moe_intermediate_size": 20,
         "num_experts_per_tok": 2}, (), 12,
    ),
    "GptOss": (
        {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2}, (), 12,
    ),
    "GPT2": (GPT2, (), 8),
    "GPT2 with embeddings": (GPT2, ("wte", "wpe"), 11),
    "Mamba": ({"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, (), 8),
    "Rwkv": ({"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, **TOKENS}, (), 14),
    "LongT5": (
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "local_radius": 3},
        (), 32,
    ),
    "Falcon": ({**FALCON, **TOKENS}, ("query_key_value", "dense", "mlp"), 8),
}  # fmt: skip
HEADS = {"GPT2": "LMHeadModel", "LongT5": "ForConditionalGeneration"}


def build(name):
    kind = name.partition(" ")[0]
    config = getattr(transformers, f"{kind}Config")(**MODELS[name][0])
    return getattr(transformers, kind + HEADS.get(kind, "ForCausalLM"))(config).eval()


def run(model, name):
    ids = torch.arange(18).view(2, 9) * 3 % 64
    with torch.no_grad():
        return model(input_ids=ids, **({"decoder_input_ids": ids} if name == "LongT5" else {})).logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weight_format", [NF4(), Int8()], ids=["nf4", "int8"])
def test_a_transformers_model_computes_what_its_dequantized_weights_do(name, weight_format, tmp_path):
    plain, named, count = build(name), *MODELS[name][1:]
    config = QuantizationConfig(weight_format, also_quantize=named)
    model = load_and_quantize_model(copy.deepcopy(plain), None, config, "cpu")
    assert len(quantized_weights(model)) == count
    assert model.num_parameters() == plain.num_parameters()
    Accelerator().save_model(model, tmp_path / "saved")
    out = run(model, name)
    assert_near(out, run(dequantized(model, plain), name), weight_format)
    empty = skeleton(build, name)
    empty.tie_weights()
    again = load_and_quantize_model(empty, tmp_path / "saved", device_map="cpu")
    assert torch.equal(run(again, name), out)
