"""QuantizationConfig: values, refusals, and the configs of accelerate and transformers."""

import dataclasses

import pytest
import torch
from accelerate.utils import BnbQuantizationConfig

from bigq import ConfigError, QuantizationConfig
from bigq.formats import FP4, NF4, Int8
from bigq.integrations.bitsandbytes_configs import as_config, is_config


def test_defaults():
    config = QuantizationConfig("nf4")
    assert config.weight_format() == NF4(block_size=64, double_quant=False)
    assert (config.compute_dtype, config.dtype, config.skip_modules, config.offload) == (None, None, (), None)
    assert QuantizationConfig("int8").weight_format() == Int8(threshold=6.0)


def test_a_format_with_its_settings_is_the_same_as_its_name_and_the_settings():
    assert QuantizationConfig(FP4(block_size=32, double_quant=True)) == QuantizationConfig(
        "fp4", block_size=32, double_quant=True
    )
    assert QuantizationConfig(NF4()) != QuantizationConfig(FP4())
    assert QuantizationConfig(Int8(threshold=0.0)).format == Int8(threshold=0.0)
    assert hash(QuantizationConfig(NF4())) == hash(QuantizationConfig("nf4"))


def test_replace_keeps_the_format():
    config = dataclasses.replace(QuantizationConfig("nf4", block_size=32), dtype="bf16")
    assert config == QuantizationConfig(NF4(block_size=32), dtype=torch.bfloat16)


def test_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantizationConfig("nf4").block_size = 32  # type: ignore[misc]
    with pytest.raises(TypeError):
        QuantizationConfig("nf4", 32)  # type: ignore[misc]


def test_lists_are_copied():
    names = ["head"]
    config = QuantizationConfig("nf4", skip_modules=names)  # type: ignore[arg-type]
    names.append("body")
    assert config.skip_modules == ("head",)
    assert hash(config) == hash(QuantizationConfig("nf4", skip_modules=("head",)))


@pytest.mark.parametrize("name", ["bf16", "bfloat16", torch.bfloat16])
def test_dtype_names(name):
    assert QuantizationConfig("nf4", compute_dtype=name).compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"format": "int4"}, "'nf4', 'fp4' or 'int8'"),
        ({"format": "nf4", "block_size": 48}, "32, 64, 128"),
        ({"format": "nf4", "threshold": 3.0}, "threshold=3.0 means nothing to format 'nf4'"),
        ({"format": "int8", "double_quant": True}, "double_quant=True means nothing"),
        ({"format": "int8", "block_size": 128}, "block_size=128 means nothing"),
        ({"format": "int8", "threshold": -1.0}, "a finite number >= 0"),
        ({"format": "int8", "threshold": float("nan")}, "a finite number >= 0"),
        ({"format": "nf4", "double_quant": 1}, "True or False"),
        ({"format": NF4(), "block_size": 32}, "block_size=32 beside NF4"),
        ({"format": Int8(), "threshold": 0.0}, "threshold=0.0 beside Int8"),
        ({"format": NF4}, "format is .*NF4"),
        ({"format": None}, "format is None; expected 'nf4', 'fp4' or 'int8'"),
        ({"format": ["nf4"]}, r"format is \['nf4'\]; expected 'nf4'"),
        ({"format": "nf4", "block_size": 32.0}, r"block_size is 32\.0"),
        ({"format": "nf4", "block_size": True}, "block_size is True"),
        ({"format": "int8", "threshold": 10**400}, "a finite number >= 0"),
        ({"format": "nf4", "compute_dtype": torch.int64}, r"compute_dtype is torch\.int64"),
        ({"format": "nf4", "dtype": "_inductor"}, "dtype is '_inductor'"),
        ({"format": "nf4", "dtype": ["bf16"]}, r"dtype is \['bf16'\]"),
        ({"format": "nf4", "skip_modules": 5}, "skip_modules is 5; expected a list"),
        ({"format": "nf4", "method": "best"}, r"method is 'best'; expected one of \['absmax'\]"),
        ({"format": "nf4", "also_quantize": "embed"}, r"expected a list of them: \['embed'\]"),
        ({"format": "nf4", "also_quantize": ["a..b"]}, "also_quantize holds 'a..b'"),
        ({"format": "nf4", "compute_dtype": "fp8"}, "compute_dtype is 'fp8'"),
        ({"format": "nf4", "dtype": torch.int8}, "dtype is torch.int8"),
        ({"format": "nf4", "skip_modules": "head"}, r"expected a list of them: \['head'\]"),
        ({"format": "nf4", "skip_modules": [""]}, "a module path, a name or a glob"),
        ({"format": "nf4", "keep_in_fp32_modules": [3]}, "keep_in_fp32_modules holds 3"),
        ({"format": "nf4", "offload": "disk"}, "'preserve', 'quantized' or torch.float32"),
    ],
    ids=lambda value: (
        "-".join(f"{k}={v}" for k, v in value.items() if k != "format") if isinstance(value, dict) else ""
    ),
)
def test_refusals(arguments, words):
    with pytest.raises(ConfigError, match=words):
        QuantizationConfig(**arguments)


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
    assert not is_config("nf4")
    assert not is_config(None)
    with pytest.raises(ConfigError, match=r"expected a bigq\.QuantizationConfig"):
        as_config({"format": "nf4"})
