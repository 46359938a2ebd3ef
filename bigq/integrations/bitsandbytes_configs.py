"""as_config: accelerate's and transformers' bitsandbytes configs as a QuantizationConfig."""

from typing import Any

import torch

from bigq.config import QuantizationConfig
from bigq.errors import ConfigError
from bigq.formats import Int8, make_format

__all__ = ["as_config", "is_config"]


def is_config(value: object) -> bool:
    """Whether `value` is a config of bigq, accelerate or transformers."""
    return isinstance(value, QuantizationConfig) or _foreign(value) is not None


def as_config(value: object) -> QuantizationConfig:
    """Return `value` as a QuantizationConfig. Configs of accelerate and transformers keep their own defaults.

    Raises:
        ConfigError: `value` is no config, or asks for something that bigq does not do.
    """
    if isinstance(value, QuantizationConfig):
        return value
    kind = _foreign(value)
    if kind is None:
        raise ConfigError(
            f"quantization_config is {value!r}; expected a bigq.QuantizationConfig, an accelerate "
            "BnbQuantizationConfig or a transformers BitsAndBytesConfig"
        )
    return _from_accelerate(value) if kind == "BnbQuantizationConfig" else _from_transformers(value)


def _foreign(value: object) -> str | None:
    # Compared by name, so that neither library has to be imported.
    for kind in type(value).__mro__:
        owner = kind.__module__.partition(".")[0]
        if (owner, kind.__name__) in {("accelerate", "BnbQuantizationConfig"), ("transformers", "BitsAndBytesConfig")}:
            return kind.__name__
    return None


def _from_accelerate(config: Any) -> QuantizationConfig:
    common = {
        "dtype": config.torch_dtype,
        "skip_modules": tuple(config.skip_modules or ()),
        "keep_in_fp32_modules": tuple(config.keep_in_fp32_modules or ()),
    }
    return _from_bitsandbytes(config, common)


def _from_transformers(config: Any) -> QuantizationConfig:
    if config.load_in_4bit and config.bnb_4bit_quant_storage != torch.uint8:
        raise ConfigError(f"bnb_4bit_quant_storage is {config.bnb_4bit_quant_storage}; bigq stores torch.uint8 only")
    if config.llm_int8_has_fp16_weight:
        raise ConfigError("llm_int8_has_fp16_weight=True keeps float16 weights: there is nothing to quantize")
    common = {
        "skip_modules": tuple(config.llm_int8_skip_modules or ()),
        "offload": torch.float32 if config.llm_int8_enable_fp32_cpu_offload else None,
    }
    return _from_bitsandbytes(config, common)


def _from_bitsandbytes(config: Any, common: dict[str, Any]) -> QuantizationConfig:
    """Make a config from the fields that both libraries have, and those in `common`."""
    if config.load_in_4bit == config.load_in_8bit:
        raise ConfigError(f"{type(config).__name__}: set exactly one of load_in_4bit and load_in_8bit")
    if config.load_in_8bit:
        return QuantizationConfig(Int8(threshold=float(config.llm_int8_threshold)), **common)
    return QuantizationConfig(
        make_format(config.bnb_4bit_quant_type, double_quant=config.bnb_4bit_use_double_quant),
        compute_dtype=config.bnb_4bit_compute_dtype,
        **common,
    )
