"""The configs of accelerate and transformers, and a format in place of a config."""

import pytest
import torch
from accelerate import init_empty_weights
from accelerate.utils import BnbQuantizationConfig
from safetensors.torch import save_file
from torch import nn

from bigq import (
    ConfigError,
    QuantizationConfig,
    QuantizedLinear,
    UnsupportedError,
    infer_device_map,
    load_and_quantize_model,
)
from bigq.formats import FP4, NF4, Int8
from bigq.interop.bitsandbytes_configs import as_config, is_config


def test_accelerate_config():
    config = as_config(
        BnbQuantizationConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype="bf16",
            skip_modules=["head"],
            keep_in_fp32_modules=["norm"],
        )
    )
    assert config == QuantizationConfig(
        "nf4",
        double_quant=True,
        compute_dtype=torch.bfloat16,
        dtype=torch.bfloat16,
        skip_modules=("head",),
        keep_in_fp32_modules=("norm",),
    )
    eight = as_config(BnbQuantizationConfig(load_in_8bit=True, llm_int8_threshold=5))
    assert eight == QuantizationConfig("int8", threshold=5.0, dtype=torch.float16)


def test_accelerate_defaults_stay_its_own():
    assert as_config(BnbQuantizationConfig(load_in_4bit=True)) == QuantizationConfig(
        "fp4", compute_dtype=torch.float16, dtype=torch.float16
    )


def test_transformers_config():
    transformers = pytest.importorskip("transformers")
    config = as_config(
        transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    )
    assert config == QuantizationConfig("nf4", compute_dtype=torch.bfloat16)
    eight = transformers.BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_skip_modules=["head"], llm_int8_enable_fp32_cpu_offload=True
    )
    assert as_config(eight) == QuantizationConfig("int8", skip_modules=("head",), offload=torch.float32)
    assert as_config(transformers.BitsAndBytesConfig(load_in_4bit=True)).weight_format() == FP4()
    with pytest.raises(ConfigError, match="exactly one"):
        as_config(transformers.BitsAndBytesConfig())
    stored_wide = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"stores torch\.uint8 only"):
        as_config(stored_wide)
    with pytest.raises(ConfigError, match="has_fp16_weight"):
        as_config(transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True))


def test_what_is_no_config():
    assert not is_config("owner/name")
    assert not is_config(None)
    with pytest.raises(ConfigError, match=r"expected a bigq\.QuantizationConfig"):
        as_config({"format": "nf4"})


@pytest.mark.parametrize(
    "value, expected",
    [("nf4", NF4()), ("NF4", NF4()), ("int8", Int8()), (FP4(block_size=32), FP4(block_size=32))],
    ids=str,
)
def test_a_format_in_place_of_a_config(value, expected):
    assert is_config(value)
    assert as_config(value) == QuantizationConfig(expected)


def test_the_name_of_a_format_is_no_config_where_a_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_config("nf4")
    (tmp_path / "nf4").mkdir()
    assert not is_config("nf4")


@pytest.mark.parametrize("value", ["int3", 4, NF4, {"load_in_4bit": True}], ids=str)
def test_a_refusal_says_what_to_write(value):
    with pytest.raises(ConfigError, match=r"expected a bigq\.QuantizationConfig such as QuantizationConfig\('nf4'\)"):
        as_config(value)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)


def test_what_a_foreign_config_skips_need_not_be_in_the_model(tmp_path):
    """One config serves many models, some of them without an lm_head."""
    transformers = pytest.importorskip("transformers")
    save_file(Net().state_dict(), tmp_path / "m.safetensors")
    configs = [
        transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "b"]),
        BnbQuantizationConfig(load_in_8bit=True, skip_modules=["b", "lm_head"], keep_in_fp32_modules=["router"]),
    ]
    for config in configs:
        with init_empty_weights():
            model = Net()
        assert infer_device_map(model, config)
        load_and_quantize_model(model, tmp_path / "m.safetensors", config, "cpu", progress=False)
        assert [isinstance(module, QuantizedLinear) for module in (model.a, model.b, model.head)] == [
            True,
            False,
            False,
        ]
    own = QuantizationConfig("nf4", skip_modules=["lm_head"])
    with init_empty_weights():
        model = Net()
    with pytest.raises(ConfigError, match="skip_modules 'lm_head' matches no module"):
        load_and_quantize_model(model, tmp_path / "m.safetensors", own, "cpu", progress=False)


def test_a_name_and_the_weights_in_the_order_of_accelerate(tmp_path):
    save_file(Net().state_dict(), tmp_path / "m.safetensors")
    for arguments in ((tmp_path / "m.safetensors", "nf4"), ("NF4", tmp_path / "m.safetensors")):
        with init_empty_weights():
            model = Net()
        load_and_quantize_model(model, *arguments, device_map="cpu", progress=False)
        assert model.a.weight.dtype == torch.float32
        assert isinstance(model.a, QuantizedLinear)


@pytest.mark.parametrize("kind", ["Linear4bit", "LinearNF4", "Linear8bitLt"])
def test_a_model_that_bitsandbytes_has_converted(tmp_path, kind):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    save_file(Net().state_dict(), tmp_path / "m.safetensors")
    model = Net()
    model.b = getattr(bitsandbytes.nn, kind)(8, 8)
    with pytest.raises(UnsupportedError, match=rf"layers of bitsandbytes \({kind} 'b'\): build it without their"):
        load_and_quantize_model(model, tmp_path / "m.safetensors", "nf4", "cpu", progress=False)
