"""Files of bitsandbytes itself, written by transformers: every part that is loaded has the bits that they hold."""

import warnings

import pytest
import torch
from accelerate import init_empty_weights

import bigq
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
    return kind.from_config(config).to(dtype).eval()


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
        skeleton = kind.from_config(model_config, dtype=torch.bfloat16)
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
