"""Adapters and weights that others have quantized are refused as what they are; float8 without scales is a cast."""

import json
import os

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn

from bigq import CheckpointError, QuantizationConfig, QuantizedLinear, load_and_quantize_model
from bigq.checkpoint import Checkpoint


def refused(location, words):
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(location)


@pytest.mark.parametrize(
    "config", [{"base_model_name_or_path": "owner/base"}, {}, None], ids=["base", "none", "no file"]
)
def test_an_adapter(tmp_path, config):
    save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = " of owner/base" if config else ""
    for location in (tmp_path, tmp_path / "adapter_model.safetensors"):
        refused(location, f"holds a LoRA adapter{base} and no model.*PeftModel.from_pretrained")


CODES = {"q.weight": torch.ones(2, 2, dtype=torch.uint8), "norm.weight": torch.ones(2)}


@pytest.mark.parametrize(
    "said, name",
    [
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
        ({"quant_method": "gptq"}, "GPTQ"),
        ({"quant_method": "hqq"}, "HQQ"),
        ({"quant_method": "fp8"}, "FP8 with scales"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "of tomorrow"}, "of tomorrow"),
        ({"quant_method": ["a"]}, r"\['a'\]"),
    ],
    ids=str,
)
def test_a_folder_whose_config_says_how_it_is_quantized(tmp_path, said, name):
    save_file(CODES, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    for location in (tmp_path, tmp_path / "model.safetensors"):
        refused(location, f"quantized already: {name}, which bigq does not read; take the original weights")


SCALED = {"q.weight": torch.ones(2, 4).to(torch.float8_e4m3fn), "q.weight_scale": torch.ones(2, 1)}


@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", None])
def test_codes_that_are_decoded_are_no_obstacle(tmp_path, method):
    save_file(SCALED, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    assert len(Checkpoint.open(tmp_path).tensors) == 2


@pytest.mark.parametrize(
    "tensors, said",
    [
        (CODES | {"p.weight_packed": torch.ones(2, 2, dtype=torch.int32)}, {}),
        ({}, {"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}),
        ({}, {"sparsity_config": {"format": "sparse-24-bitmask"}}),
        ({"w": torch.ones(2, 2, dtype=torch.int8), "w_scale": torch.ones(1), "w_zero_point": torch.ones(1)}, {}),
    ],
    ids=["other codes", "rotated", "sparse", "zero points"],
)  # fmt: skip
def test_codes_among_others_or_of_changed_weights_are_refused(tmp_path, tensors, said):
    save_file(SCALED | {f"other.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    said = {"quant_method": "compressed-tensors"} | said
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    refused(tmp_path, "quantized already: compressed-tensors, which bigq does not read")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"quantization_config": 3}', "[" * 9999], ids=lambda c: c[:9])
def test_a_config_that_says_nothing_is_no_obstacle(tmp_path, content):
    save_file(CODES, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(content)
    assert len(Checkpoint.open(tmp_path).tensors) == 2


def test_a_config_that_is_a_pipe_is_not_waited_for(tmp_path):
    save_file(CODES, tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "config.json")
    assert len(Checkpoint.open(tmp_path).tensors) == 2


def test_plain_weights_are_plain_whatever_a_config_says(tmp_path):
    """A model that was dequantized and saved may have kept its config."""
    tensors = {"q.weight": torch.ones(2, 2, dtype=torch.bfloat16), "ids": torch.arange(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
    assert Checkpoint.open(tmp_path).get("q.weight").tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    "leaf, name",
    [
        ("qweight", "GPTQ or AWQ"),
        ("W_q", "HQQ"),
    ],
)
def test_a_file_whose_names_say_how_it_is_quantized(tmp_path, leaf, name):
    save_file({f"q.{leaf}": torch.ones(2, 2, dtype=torch.uint8), "q.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    refused(tmp_path, f"quantized already: {name}")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3, bias=False)


CONFIG = QuantizationConfig("nf4", block_size=32)


def load(path, build=Net, **kwargs):
    with init_empty_weights():
        model = build()
    return load_and_quantize_model(model, path, kwargs.pop("config", CONFIG), "cpu", progress=False, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_without_a_scale_is_a_cast(tmp_path, dtype):
    torch.manual_seed(0)
    tensors = {name: tensor.to(dtype) for name, tensor in Net().state_dict().items()}
    save_file(tensors, tmp_path / "float8.safetensors")
    save_file({name: tensor.float() for name, tensor in tensors.items()}, tmp_path / "float32.safetensors")
    model, expected = load(tmp_path / "float8.safetensors"), load(tmp_path / "float32.safetensors")
    assert isinstance(model.a, QuantizedLinear)
    assert model.a.weight.dtype == torch.float32  # as a skeleton has it: what it was cast from is not said
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected.state_dict()[name].dtype
        assert torch.equal(tensor, expected.state_dict()[name]), name
    half = load(tmp_path / "float8.safetensors", config=QuantizationConfig("nf4", dtype="fp16"))
    assert (half.a.weight.dtype, half.norm.weight.dtype) == (torch.float16, torch.float16)


def test_one_weight_among_others_may_be_float8(tmp_path):
    tensors = {**Net().state_dict(), "c": torch.ones(1)}
    tensors["head.weight"] = tensors["head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "a.safetensors")
    config = QuantizationConfig("nf4", block_size=32, skip_defaults=False)
    model = load(tmp_path, config=config, strict=False)
    packed = config.weight_format().quantize(tensors["head.weight"].float())["packed"]
    assert torch.equal(model.head.weight_packed, packed)


@pytest.mark.parametrize(
    "scale",
    [
        "a.scale_weight",
        "a.weight_scales",
        "a.weight_scale_2",
        "a.weight_global_scale",
        "a.weight_descale",
        "a.weight_dequant_scale",
        "a.weight_inv_scale",
        "a.weight_scaling_factor",
        "a.qscale_weight",
    ],
)
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
def test_float8_with_a_scale_of_an_unknown_name_is_refused(tmp_path, scale, strict):
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in Net().state_dict().items()}
    save_file({**tensors, scale: torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="a scaled storage format"):
        load(tmp_path, strict=strict)


@pytest.mark.parametrize("shape", [(8,), (2, 4)], ids=str)
def test_a_float8_tensor_of_the_models_own_stays_one(tmp_path, shape):
    class Own(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.arange(8.0).to(torch.float8_e4m3fn).view(shape))
            self.table_scale = nn.Parameter(torch.full((1,), 3.0))

    save_file(Own().state_dict(), tmp_path / "a.safetensors")
    for config in (CONFIG, QuantizationConfig("nf4", dtype="fp16", cast_buffers=True)):
        for strict in (True, False):
            model = load(tmp_path, Own, config=config, strict=strict)
            assert model.table.dtype == torch.float8_e4m3fn
            assert model.table.float().flatten().tolist() == list(range(8))
            assert model.table_scale.tolist() == [3.0]
