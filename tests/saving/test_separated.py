"""separated: experts of other libraries' layouts, one by one, as checkpoints hold them."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from bigq import FP4, NF4, Int8, QuantizationConfig, UnsupportedError, load_and_quantize_model, save_quantized
from bigq.converting.quantize_checkpoint import quantize_checkpoint

transformers = pytest.importorskip("transformers", minversion="5.17", reason="needs transformers' conversions of names")

SIZES = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
QWEN = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
FORMATS = {"nf4": NF4(), "fp4": FP4(block_size=32), "double": NF4(double_quant=True), "int8": Int8()}


def mixtral(**settings):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**{**SIZES, "num_local_experts": 3, **settings})
    return transformers.MixtralForCausalLM(config).bfloat16().eval()


def qwen(**settings):
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(**{**SIZES, **QWEN, **settings})
    return transformers.Qwen2MoeForCausalLM(config).bfloat16().eval()


MODELS = {  # how to build it, where its experts are in a file, their linears (gate, up and down), and the router
    "mixtral": (mixtral, "block_sparse_moe.experts", ("w1", "w3", "w2"), "block_sparse_moe.gate"),
    "qwen2-moe": (qwen, "mlp.experts", ("gate_proj", "up_proj", "down_proj"), "mlp.gate"),
}


def quantized(model, weight_format, **settings):
    return load_and_quantize_model(model, None, QuantizationConfig(weight_format, **settings), "cpu")


def of_experts(saved, layer, where, linear, end="weight"):
    return [saved[f"model.layers.{layer}.{where}.{e}.{linear}.{end}"] for e in range(3)]


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_bitsandbytes_holds_each_expert_and_the_codes_load_again(empty, tmp_path, name, weight_format):
    build, where, (gate, up, down), router = MODELS[name]
    model = quantized(build(), weight_format)
    save_quantized(model, tmp_path, layout="bitsandbytes")
    saved = load_file(tmp_path / "model.safetensors")
    experts = model.model.layers[1].mlp.experts
    is_int8 = weight_format.name == "int8"
    scales = "SCB" if is_int8 else "weight.absmax"
    joined = [[torch.cat(pair) for pair in zip(*pairs, strict=True)] for pairs in (
        (of_experts(saved, 1, where, gate), of_experts(saved, 1, where, up)),
        (of_experts(saved, 1, where, gate, scales), of_experts(saved, 1, where, up, scales)),
    )]  # fmt: skip
    assert torch.equal(torch.stack(joined[0]).flatten(), experts.gate_up_proj_packed.flatten())
    decoded = experts.stored_weight("gate_up_proj").format.scales(experts.stored_weight("gate_up_proj").state)
    assert torch.equal(torch.stack(joined[1]).flatten(), decoded.flatten())
    codes = torch.stack(of_experts(saved, 1, where, down))
    assert torch.equal(codes.flatten(), experts.down_proj_packed.flatten())
    if not is_int8:
        said = of_experts(saved, 1, where, down, f"weight.quant_state.bitsandbytes__{weight_format.name}")[2]
        said = json.loads(bytes(said.tolist()))
        assert (said["shape"], said["blocksize"]) == (list(experts.down_proj.shape[1:]), weight_format.block_size)
    assert f"model.layers.0.{router}.weight" in saved
    assert not [key for key in saved if key.endswith(("_packed", "_proj_absmax", ".quant_state", "gate_up_proj"))]
    skipped = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert f"model.layers.0.{router}" in skipped

    again = empty(build)
    again.tie_weights()
    again = load_and_quantize_model(again, tmp_path, None, "cpu", progress=False)
    expected, found = model.state_dict(), again.state_dict()
    nested = (
        {key for key in expected if "experts." in key and "_absmax" in key} if "double" in str(weight_format) else ()
    )
    for key, tensor in found.items():
        if not key.endswith("quant_state") and key not in nested:
            assert torch.equal(tensor, expected[key]), key
    ids = torch.arange(9)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", MODELS)
def test_bitsandbytes_decodes_each_expert_to_the_numbers_of_ours(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it is not silent on every CPU
        bnb = pytest.importorskip("bitsandbytes")
    build, where, (gate, up, down), _ = MODELS[name]
    model = quantized(build(), NF4(double_quant=True))
    save_quantized(model, tmp_path, layout="bitsandbytes")
    saved, experts = load_file(tmp_path / "model.safetensors"), model.model.layers[0].mlp.experts
    dense = {}
    for linear in (gate, up, down):
        for e in range(3):
            weight = f"model.layers.0.{where}.{e}.{linear}.weight"
            held = {key: tensor for key, tensor in saved.items() if key.startswith(f"{weight}.")}
            state = bnb.functional.QuantState.from_dict(held, device="cpu")
            dense[linear, e] = bnb.functional.dequantize_4bit(saved[weight], state)
    for e in range(3):
        assert torch.equal(torch.cat([dense[gate, e], dense[up, e]]), experts.gate_up_proj[e].dequantize())
        assert torch.equal(dense[down, e], experts.down_proj[e].dequantize())


@pytest.mark.parametrize("name", MODELS)
def test_compressed_tensors_holds_each_expert(tmp_path, name):
    build, where, (gate, up, down), router = MODELS[name]
    model = quantized(build(), Int8())
    save_quantized(model, tmp_path, layout="compressed-tensors")
    saved, experts = load_file(tmp_path / "model.safetensors"), model.model.layers[1].mlp.experts
    for e in range(3):
        own = [saved[f"model.layers.1.{where}.{e}.{linear}.weight"] for linear in (gate, up, down)]
        scales = [saved[f"model.layers.1.{where}.{e}.{linear}.weight_scale"] for linear in (gate, up, down)]
        assert torch.equal(torch.cat(own[:2]), experts.gate_up_proj_packed[e])
        assert torch.equal(own[2], experts.down_proj_packed[e])
        assert torch.equal(torch.cat(scales[:2]), experts.gate_up_proj_absmax[e].view(torch.float32) / 127)
        assert torch.equal(scales[2], experts.down_proj_absmax[e].view(torch.float32) / 127)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert f"model.layers.0.{router}" in said["ignore"]


@pytest.mark.parametrize("layout", ["bitsandbytes", "compressed-tensors"])
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_checkpoint_has_the_same_files(tmp_path, name, layout):
    build, *_ = MODELS[name]
    config = QuantizationConfig("int8" if layout == "compressed-tensors" else NF4(double_quant=True))
    build().save_pretrained(tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", tmp_path / "converted", config, layout=layout, progress=False)
    model = load_and_quantize_model(build(), tmp_path / "float", config, "cpu", progress=False)
    save_quantized(model, tmp_path / "saved", layout=layout)
    converted, saved = (load_file(tmp_path / folder / "model.safetensors") for folder in ("converted", "saved"))
    assert converted.keys() == saved.keys()
    assert [key for key, tensor in saved.items() if not torch.equal(tensor, converted[key])] == []


def test_transformers_with_bitsandbytes_refuses_such_a_folder(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("bitsandbytes")
    save_quantized(quantized(qwen(), NF4()), tmp_path, layout="bitsandbytes")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")


def test_shards_are_split_between_layers(empty, tmp_path):
    model = quantized(mixtral(), NF4())
    save_quantized(model, tmp_path, layout="bitsandbytes", max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = load_and_quantize_model(empty(mixtral), tmp_path, None, "cpu", progress=False)
    assert torch.equal(again(torch.arange(9)[None]).logits, model(torch.arange(9)[None]).logits)


def test_what_no_checkpoint_holds_one_by_one_is_refused_by_name(tmp_path):
    config = transformers.GptOssConfig(**SIZES, num_local_experts=3, head_dim=32)
    model = quantized(transformers.GptOssForCausalLM(config), NF4())
    with pytest.raises(UnsupportedError, match=r"mlp.experts.gate_up_proj: it is not the weight of a linear, nor"):
        save_quantized(model, tmp_path, layout="bitsandbytes")
    model = quantized(qwen(moe_intermediate_size=96), NF4())
    with pytest.raises(UnsupportedError, match=r"mlp.experts.down_proj: a row has 96 numbers.* multiple of the block"):
        save_quantized(model, tmp_path, layout="bitsandbytes")
    assert list(tmp_path.iterdir()) == []
