"""Files of bitsandbytes, both ways: each library loads what the other wrote, and every part keeps its bits."""

import json
import warnings
from copy import deepcopy

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import nn

import bigq
from bigq import QuantizationConfig
from bigq.formats import QUANT_STATE

transformers = pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing it is not silent on every CPU
    bnb = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
LLAMA = transformers.LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=320,
    tie_word_embeddings=False,
    attention_bias=True,
)
GPT2 = transformers.GPT2Config(
    vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
)
IDS = torch.arange(9)[None]


def nf4(**settings):
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32, **settings}
    return transformers.BitsAndBytesConfig(load_in_4bit=True, **settings)


CONFIGS = {
    "nf4": nf4(),
    "fp4": nf4(bnb_4bit_quant_type="fp4"),
    "double": nf4(bnb_4bit_use_double_quant=True),
    "fp4-double": nf4(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
    "as-bfloat16": nf4(bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage=torch.bfloat16),
    "as-float16": nf4(bnb_4bit_quant_storage=torch.float16),
    "as-float32": nf4(bnb_4bit_quant_storage=torch.float32),
    "skip": nf4(llm_int8_skip_modules=["lm_head", "up_proj"]),
    "int8": transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=5.0),
}


def plain(config=LLAMA, dtype=torch.bfloat16, kind=transformers.AutoModelForCausalLM):
    torch.manual_seed(0)
    return kind.from_config(deepcopy(config)).to(dtype).eval()  # a model changes its config


def theirs(folder, config=None):
    settings = {} if config is None else {"quantization_config": config}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **settings).eval()


def saved_by_them(tmp_path, config, model_config=LLAMA):
    """The folder of a model that bitsandbytes has quantized, and the model."""
    plain(model_config).save_pretrained(tmp_path / "plain")
    model = theirs(tmp_path / "plain", config)
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", model


def ours(folder, model_config=LLAMA, config=None, kind=transformers.AutoModelForCausalLM):
    with init_empty_weights():
        skeleton = kind.from_config(deepcopy(model_config), dtype=torch.bfloat16)
    return bigq.load_and_quantize_model(skeleton, folder, config, "cpu", progress=False).eval()


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_holds_the_bits_of(model, state):
    """`model`, loaded here, holds every tensor of `state`, theirs."""
    left = dict(state)
    for name, module in model.named_modules():
        if not isinstance(module, bigq.QuantizedModule):
            continue
        for part, tensor in module.state_dict(keep_vars=True).items():
            own = f"{name}.{part}"
            old = {
                "weight_packed": f"{name}.weight",
                "weight_absmax": f"{name}.SCB" if f"{name}.SCB" in state else f"{name}.weight.absmax",
                "weight_nested_absmax": f"{name}.weight.nested_absmax",
                "bias": own,
            }.get(part)
            if old is not None:
                assert torch.equal(bits(tensor), bits(left.pop(old))), own
            elif part == "weight_nested_offset":
                (quant_state,) = (n for n in state if n.startswith(f"{name}.weight.quant_state"))
                assert f'"nested_offset": {tensor.view(torch.float32).item()}}}' in bytes(state[quant_state]).decode()
            else:
                assert part == QUANT_STATE
    own = model.state_dict()
    for name, tensor in left.items():
        if not name.endswith((".weight_format", "quant_map", "bitsandbytes__nf4", "bitsandbytes__fp4")):
            assert torch.equal(bits(own[name]), bits(tensor)), name


@pytest.mark.parametrize("name", CONFIGS)
def test_every_part_has_the_bits_of_theirs(tmp_path, name):
    folder, model = saved_by_them(tmp_path, CONFIGS[name])
    loaded = ours(folder)
    assert_holds_the_bits_of(loaded, model.state_dict())
    up = loaded.model.layers[0].mlp.up_proj
    assert isinstance(up, bigq.QuantizedLinear) == (name != "skip")
    for path, module in loaded.named_modules():
        if not isinstance(module, bigq.QuantizedLinear):
            continue
        own = model.get_submodule(path).weight
        dense = module.weight.dequantize()
        if name == "int8":
            assert module.descriptions["weight"].format.threshold == 5.0
            expected = bnb.functional.int8_vectorwise_dequant(own.data, own.SCB).to(torch.bfloat16)
            torch.testing.assert_close(dense, expected, rtol=2**-8, atol=0)  # they divide by 127 in another order
        else:
            assert module.compute_dtype == torch.float32
            assert torch.equal(dense, bnb.functional.dequantize_4bit(own.data, own.quant_state)), path


@pytest.mark.parametrize("name", ["nf4", "as-bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["AutoModelForCausalLM", "AutoModel"])
def test_a_transposed_weight_is_stored_upright(tmp_path, name, kind):
    """GPT-2's, also loaded into the base model, whose names have no prefix."""
    folder, model = saved_by_them(tmp_path, CONFIGS[name], GPT2)
    loaded = ours(folder, GPT2, kind=getattr(transformers, kind))
    assert_holds_the_bits_of(
        loaded,
        {
            name.removeprefix("transformer.") if kind == "AutoModel" else name: tensor
            for name, tensor in model.state_dict().items()
            if kind != "AutoModel" or name.startswith("transformer.")
        },
    )
    blocks = loaded.h if kind == "AutoModel" else loaded.transformer.h
    assert blocks[0].attn.c_attn.weight.shape == (64, 192)
    if kind == "AutoModelForCausalLM":
        with torch.no_grad():
            torch.testing.assert_close(loaded(IDS)[0], model(IDS)[0], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name", ["nf4", "double", "int8"])
def test_it_computes_what_they_compute(tmp_path, name):
    folder, model = saved_by_them(tmp_path, CONFIGS[name])
    with torch.no_grad():
        torch.testing.assert_close(ours(folder)(IDS)[0], model(IDS)[0], rtol=0.05, atol=0.02)


def test_tied_embeddings(tmp_path):
    tied = transformers.LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": True})
    folder, model = saved_by_them(tmp_path, CONFIGS["nf4"], tied)
    loaded = ours(folder, tied)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_holds_the_bits_of(loaded, model.state_dict())


def logits(model):
    with torch.no_grad():
        return model(IDS)[0]


def read(folder):
    return load_file(folder / "model.safetensors")


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(bits(tensor), bits(other[name])), name


@pytest.mark.parametrize(
    "name, model_config",
    [(name, LLAMA) for name in ("nf4", "fp4-double", "as-bfloat16", "skip", "int8")]
    + [(name, GPT2) for name in ("double", "int8")],
    ids=lambda value: value if isinstance(value, str) else value.model_type,
)
def test_what_they_wrote_is_written_again_as_it_was(tmp_path, name, model_config):
    folder, _ = saved_by_them(tmp_path, CONFIGS[name], model_config)
    bigq.save_quantized(ours(folder, model_config), tmp_path / "again", layout="bitsandbytes")
    assert_same_bits(read(tmp_path / "again"), read(folder))
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again"))
    skipped = [f"model.layers.{i}.mlp.up_proj" for i in range(2)] if name == "skip" else []
    said = {"llm_int8_skip_modules": [*skipped, "lm_head"], "bnb_4bit_quant_storage": "uint8"}
    before["quantization_config"] |= said
    assert after == before
    assert (tmp_path / "again" / "generation_config.json").exists()
    again = theirs(tmp_path / "again")
    assert torch.equal(logits(again), logits(theirs(folder)))


@pytest.mark.parametrize("name", ["nf4", "fp4", "double", "int8"])
def test_they_load_and_save_what_was_quantized_here(tmp_path, name):
    config = QuantizationConfig(
        {"nf4": bigq.NF4(), "fp4": bigq.FP4(block_size=32), "double": bigq.NF4(double_quant=True)}.get(name, "int8"),
        compute_dtype=None if name == "int8" else "bf16",
    )
    plain().save_pretrained(tmp_path / "plain")
    model = ours(tmp_path / "plain", config=config)
    bigq.save_quantized(model, tmp_path / "ours", layout="bitsandbytes")
    loaded = theirs(tmp_path / "ours")
    kind = bnb.nn.Linear8bitLt if name == "int8" else bnb.nn.Linear4bit
    assert type(loaded.model.layers[0].mlp.up_proj) is kind
    assert type(loaded.lm_head) is nn.Linear
    assert_same_bits({key: loaded.state_dict()[key] for key in read(tmp_path / "ours")}, read(tmp_path / "ours"))
    loaded.save_pretrained(tmp_path / "theirs", save_original_format=False)
    again = ours(tmp_path / "theirs")
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    torch.testing.assert_close(logits(model), logits(loaded), rtol=0.05, atol=0.02)


def test_a_folder_in_bigqs_layout_is_that_of_save_pretrained(tmp_path):
    plain().save_pretrained(tmp_path / "plain")
    model = ours(tmp_path / "plain", config=QuantizationConfig("nf4"))
    bigq.save_quantized(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    assert_same_bits(read(tmp_path / "ours"), read(tmp_path / "theirs"))
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / file).read_text() == (tmp_path / "theirs" / file).read_text()


def test_tied_embeddings_are_written_once(tmp_path):
    tied = transformers.LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": True})
    folder, _ = saved_by_them(tmp_path, CONFIGS["nf4"], tied)
    bigq.save_quantized(ours(folder, tied), tmp_path / "again", layout="bitsandbytes")
    assert "lm_head.weight" not in read(tmp_path / "again")
    assert torch.equal(logits(theirs(tmp_path / "again")), logits(theirs(folder)))


def test_a_subclass_that_transformers_leaves_alone_is_refused(tmp_path):
    class Own(nn.Linear):
        pass

    model = plain()
    model.model.layers[0].mlp.up_proj.__class__ = Own
    model = bigq.load_and_quantize_model(model, None, "nf4", "cpu")
    with pytest.raises(bigq.UnsupportedError, match=r"layers\.0\.mlp\.up_proj\.weight: transformers leaves Own alone"):
        bigq.save_quantized(model, tmp_path, layout="bitsandbytes")


@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["absmax", "double"])
def test_blocks_that_span_rows_are_dequantized_as_they_do_it(tmp_path, double_quant, transposed):
    torch.manual_seed(0)
    weights = {"0": torch.randn(5, 72).bfloat16(), "1": torch.randn(7, 64).bfloat16()}
    tensors, expected = {"0.bias": torch.zeros(5), "1.bias": torch.zeros(7)}, {}
    for name, weight in weights.items():
        packed, state = bnb.functional.quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant
        )
        described = {f"{name}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        tensors |= {f"{name}.weight": packed, **described}
        expected[name] = bnb.functional.dequantize_4bit(packed, state)
    save_file(tensors, tmp_path / "model.safetensors")
    first = transformers.pytorch_utils.Conv1D(5, 72) if transposed else nn.Linear(72, 5)
    model = nn.Sequential(first, nn.Linear(64, 7)).to("meta")
    with pytest.warns(UserWarning, match=r"1 weights of .* are dequantized.*: 0\.weight"):
        bigq.load_and_quantize_model(model, tmp_path, device_map="cpu", progress=False)
    assert type(model[0]) is type(first)
    assert torch.equal(model[0].weight.mT if transposed else model[0].weight, expected["0"])
    assert torch.equal(model[1].weight.dequantize(), expected["1"])
